"""Trainer callbacks: progress as TrainSteps and JSON lines, and a stop that keeps what was learnt."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from medusa_chat.events import TrainStep
from medusa_chat.machine.devices import peak_memory
from medusa_chat.training.schedules import heads_weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from medusa_chat.training.trainee import Trainee

LOG_FILE = "training.jsonl"


class Report(TrainerCallback):
    """Tells the trainee where the run stands, and turns what Trainer logs into TrainSteps, shown and kept in a file."""

    def __init__(
        self, trainee: Trainee, progress: Callable[[TrainStep], None], log: Path, step_tokens: int
    ) -> None:
        self.trainee, self.progress, self.log, self.step_tokens = (
            trainee,
            progress,
            log,
            step_tokens,
        )
        self.started, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            _cut_log(self.log, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainee.step, self.trainee.total = state.global_step, state.max_steps

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step = self._step(state, float(logs["loss"]), kwargs.get("optimizer"))
        if state.is_world_process_zero:
            with self.log.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(step.as_json()) + "\n")
            self.progress(step)

    def _step(self, state: Any, loss: float, optimizer: Any) -> TrainStep:
        means = self.trainee.meter.read()
        done, seconds = state.global_step - self.first, time.perf_counter() - self.started
        per_head = {name: tuple(means.get(name, ())) for name in ("head_loss", "top1", "top5")}
        peaks = peak_memory()
        groups = optimizer.param_groups if optimizer is not None else ()
        return TrainStep(
            state.global_step,
            state.max_steps,
            loss,
            means.get("backbone_loss"),
            **per_head,
            heads_weight=heads_weight(self.trainee.recipe, state.global_step, state.max_steps),
            learning_rates=tuple(group["lr"] for group in groups),
            tokens_per_second=done * self.step_tokens / seconds,
            seconds_left=(state.max_steps - state.global_step) * seconds / max(done, 1),
            memory=peaks.get("device", peaks.get("host", 0)),
        )


def _cut_log(log: Path, step: int) -> None:
    """Keep the lines up to `step`: a run that resumes writes those behind it again."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off
    log.write_text("".join(kept), encoding="utf-8")


class Stopper(TrainerCallback):
    """The first Ctrl-C ends the run after its step, with a checkpoint; a second one ends it at once."""

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

    def _on_signal(self, number: int, frame: Any) -> None:
        self.asked = True
        self._say("stopping after this step; Ctrl-C again stops at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = torch.tensor(self.asked, dtype=torch.int32, device=args.device)
        if args.world_size > 1:  # the signal may reach one process a step later than another
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            control.should_save = control.should_training_stop = True
