"""Trainer's callback for the progress of a run: TrainSteps, and a log of JSON lines."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from medusa_chat.events import TrainStep
from medusa_chat.files import write_text
from medusa_chat.machine.devices import peak_memory
from medusa_chat.training.schedules import heads_weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.training.trainee import Trainee

LOG_FILE = "training.jsonl"


class ProgressLog(TrainerCallback):
    """Sets the trainee's step, and passes Trainer's logs on as TrainSteps.

    Attributes:
        file: a line of JSON is added to it for each TrainStep.
        progress: called with each TrainStep.
        step_tokens: tokens of one step.
    """

    def __init__(
        self, trainee: Trainee, progress: Callable[[TrainStep], None], file: Path, step_tokens: int
    ) -> None:
        self.trainee = trainee
        self.progress = progress
        self.file = file
        self.step_tokens = step_tokens
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the clock, and drop log lines of steps that will be taken again."""
        self._started = time.perf_counter()
        self._first_step = state.global_step
        if state.is_world_process_zero:
            _cut_log(self.file, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Set the trainee's step."""
        self.trainee.step = state.global_step
        self.trainee.total = state.max_steps

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Write a line and call `progress`."""
        if not logs or "loss" not in logs:
            return
        step = self._step(state, float(logs["loss"]), optimizer)
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(step.as_json()) + "\n")
            with suppress(OSError):  # a terminal that was closed does not end the run
                self.progress(step)

    def _step(self, state: Any, loss: float, optimizer: Any) -> TrainStep:
        means = self.trainee.meter.read()
        step = state.global_step
        total = state.max_steps
        done = step - self._first_step
        seconds = time.perf_counter() - self._started
        peaks = peak_memory()
        groups = optimizer.param_groups if optimizer is not None else ()
        return TrainStep(
            step,
            total,
            loss,
            means.get("backbone_loss"),
            head_loss=tuple(means.get("head_loss", ())),
            top1=tuple(means.get("top1", ())),
            top5=tuple(means.get("top5", ())),
            heads_weight=heads_weight(self.trainee.recipe, step, total),
            learning_rates=tuple(group["lr"] for group in groups),
            tokens_per_second=done * self.step_tokens / seconds,
            seconds_left=(total - step) * seconds / max(done, 1),
            memory=peaks.get("device", peaks.get("host", 0)),
        )


def _cut_log(log: Path, step: int) -> None:
    """Keep the lines up to `step`: a resumed run writes the later ones again."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line that was cut off
    write_text(log, "".join(kept))
