"""Trainer's callback that saves: on a signal, which ends the run, and after some time."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

# Ctrl-C, `kill`, and a terminal that is closed; those that the system has.
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Stopper(TrainerCallback):
    """Ends the run after its step, with a checkpoint, on a signal; saves one now and then too.

    A second Ctrl-C ends the run at once.

    Args:
        say: called with a line for the user.
        every: seconds between checkpoints; 0 for none by time.
    """

    def __init__(self, say: Callable[[str], None], every: float = 0) -> None:
        self.asked = False
        self._say = say
        self._every = every
        self._saved = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if self.asked:
            return
        self.asked = True
        with suppress(OSError):  # the terminal may be gone
            self._say("stopping after this step; Ctrl-C again stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        self._saved = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the clock anew."""
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Ask Trainer to save and stop if any process got a signal, and to save if it is time."""
        due = 0 < self._every <= time.monotonic() - self._saved
        wishes = torch.tensor([self.asked, due], dtype=torch.int32, device=args.device)
        if args.world_size > 1:  # a signal may reach one process a step later than another
            torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
        stop, save = wishes.tolist()
        if stop or save:
            control.should_save = True
        if stop:
            control.should_training_stop = True
