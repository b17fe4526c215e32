"""Keys and Ctrl-C while a reply is on its way."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

INPUT_FLAGS, LOCAL_FLAGS = 0, 3  # where termios keeps them


@contextmanager
def quiet_input() -> Iterator[None]:
    """Keys that are typed meanwhile do not show up inside the reply; the next prompt reads them."""
    try:
        import termios
    except ImportError:  # Windows echoes nothing by itself
        yield
        return
    terminal = sys.stdin.fileno()
    saved = termios.tcgetattr(terminal)
    quiet = saved.copy()
    quiet[LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
    quiet[INPUT_FLAGS] &= ~termios.ICRNL  # the prompt tells Enter (sends) from a newline
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, saved)


class Interrupt:
    """Ctrl-C during a reply: once tokens stream it waits for the step to end, so that no row is left half drawn.

    Before the first token, and when pressed again, it breaks in wherever the engine is.
    """

    def __init__(self) -> None:
        self.streaming = False
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, where: FrameType | None) -> None:
        if self.asked or not self.streaming:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Call after each step. Raises KeyboardInterrupt if the user asked for it."""
        self.streaming = True
        if self.asked:
            raise KeyboardInterrupt
