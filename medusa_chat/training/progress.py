"""Trainer callbacks: progress as TrainSteps and JSON lines, and a stop that keeps the result."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from medusa_chat.events import TrainStep
from medusa_chat.files import write_text
from medusa_chat.machine.devices import peak_memory
from medusa_chat.training.schedules import heads_weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

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
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off
    write_text(log, "".join(kept))


class Stopper(TrainerCallback):
    """Ends the run after its step, with a checkpoint, on Ctrl-C. A second Ctrl-C ends it at once.

    Args:
        say: called with a line for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = False
        self._say = say
        self._before: Any = None

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.asked = True
        self._say("stopping after this step; Ctrl-C again stops at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Ask Trainer to save and stop if any process got the signal."""
        asked = torch.tensor(self.asked, dtype=torch.int32, device=args.device)
        if args.world_size > 1:  # the signal may reach one process a step later than another
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            control.should_save = True
            control.should_training_stop = True
