"""Keys and Ctrl-C while a reply streams."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

INPUT_FLAGS, LOCAL_FLAGS = 0, 3  # indices into the list of termios


@contextmanager
def quiet_input() -> Iterator[None]:
    """Keep typed keys out of the reply on the screen; the next prompt reads them."""
    try:
        import termios
    except ImportError:  # Windows echoes nothing by itself
        yield
        return
    terminal = sys.stdin.fileno()
    saved = termios.tcgetattr(terminal)
    quiet = saved.copy()
    quiet[LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
    quiet[INPUT_FLAGS] &= ~termios.ICRNL  # the prompt distinguishes Enter (sends) from a newline
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, saved)


class Interrupt:
    """Context manager that lets Ctrl-C end a reply between two steps, with no row half drawn.

    Before the first token, and when pressed again, Ctrl-C interrupts the engine at once.
    """

    def __init__(self) -> None:
        self._streaming = False
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked or not self._streaming:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed; call it after each step."""
        self._streaming = True
        if self._asked:
            raise KeyboardInterrupt
