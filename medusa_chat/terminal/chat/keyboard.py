"""Keys and signals while a reply streams or the model loads."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

INPUT_FLAGS, LOCAL_FLAGS = 0, 3  # indices into the list of termios
# Signals that end a program which does not handle them, as far as the system has them.
ENDING = (
    *("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"),
    *("SIGALRM", "SIGVTALRM", "SIGPROF", "SIGXCPU"),  # limits of time, as of `ulimit -t`
)
SUSPEND = getattr(signal, "SIGTSTP", None)  # Windows has none


class QuietInput:
    """Context manager that keeps typed keys off the screen; the next prompt reads them."""

    def __init__(self) -> None:
        self._saved: Any = None

    def __enter__(self) -> QuietInput:
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def resume(self) -> None:
        """Stop the echo of keys."""
        try:
            import termios
        except ImportError:  # Windows echoes nothing by itself
            return
        terminal = sys.stdin.fileno()
        self._saved = termios.tcgetattr(terminal)
        quiet = self._saved.copy()
        quiet[LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
        quiet[INPUT_FLAGS] &= ~termios.ICRNL  # the prompt tells Enter (sends) from a newline
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)

    def pause(self) -> None:
        """Set the terminal as it was."""
        if self._saved is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._saved)
            self._saved = None


@contextmanager
def ending_signals() -> Iterator[None]:
    """Let a signal that ends the program raise SystemExit, so that the terminal is set right."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """Context manager that lets signals act between two steps, with no row half drawn.

    Ctrl-C ends the reply, and Ctrl-Z stops the program until it is in the foreground again. Before
    the first step, and when Ctrl-C is pressed again, they act at once. So do signals that end the
    program.
    """

    def __init__(self, suspend: Callable[[], None], resume: Callable[[], None]) -> None:
        """Start before the first step.

        Args:
            suspend: sets the terminal as the shell expects it.
            resume: sets it as the reply needs it.
        """
        self._suspend = suspend
        self._resume = resume
        self._streaming = False
        self._interrupted = False
        self._suspended = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        if SUSPEND is not None:
            self._before[SUSPEND] = signal.signal(SUSPEND, self._on_suspend)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._interrupted or not self._streaming:
            raise KeyboardInterrupt
        self._interrupted = True

    def _on_suspend(self, _number: int, _frame: FrameType | None) -> None:
        self._suspended = True
        if not self._streaming:
            self._stop()

    def check(self) -> None:
        """Act on the signals since the last step. Raises KeyboardInterrupt after Ctrl-C."""
        self._streaming = True
        if self._interrupted:
            raise KeyboardInterrupt
        if self._suspended:
            self._stop()

    def _stop(self) -> None:
        """Stop this program until `fg` continues it."""
        self._suspended = False
        self._suspend()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._resume()
