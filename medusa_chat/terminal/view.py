"""A reply as it streams: finished rows scroll away, the last row and the panel are redrawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.terminal.theme import LABEL, head_mark, head_style
from medusa_chat.terminal.wrapping import Flow

if TYPE_CHECKING:
    from rich.console import Console

    from medusa_chat.events import Step

REFRESH_SECONDS = 0.05
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
ERASE_BELOW = "\r\x1b[J"
STOPPED = "[stopped]"

Panel = Callable[[int], list[Text]]  # width -> rows


class ReplyView:
    """Context manager that draws one reply and leaves only its text on the screen.

    Between two refreshes the cursor waits at the start of the growing row. A terminal keeps it
    there when it is resized, so erasing from the cursor down is always exact. (rich's Live waits
    below its last row: a narrower terminal then leaves remains on the screen.)

    `panel` is called at each refresh, and `marks` adds each token's head in a small digit.
    Two refreshes are at least REFRESH_SECONDS of `clock` apart.
    """

    def __init__(
        self,
        console: Console,
        panel: Panel,
        *,
        marks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._panel = panel
        self._marks = marks
        self._clock = clock
        self._flow = Flow()
        self._drawn_at = 0.0
        self.empty = True

    def __enter__(self) -> ReplyView:
        self._write(HIDE_CURSOR)
        self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and not self.empty:
            self._flow.feed(" " + STOPPED, LABEL)
        try:
            self._finish()
        finally:
            self._write(SHOW_CURSOR)

    def add(self, step: Step) -> None:
        """Add the tokens of a step; redraw if the last refresh is long enough ago."""
        for token in step.tokens:
            if token.text:
                mark = head_mark(token.head) if self._marks else ""
                self._flow.feed(token.text, head_style(token.head), mark)
                self.empty = self.empty and not token.text.strip()
        if self._clock() - self._drawn_at >= REFRESH_SECONDS:
            self._draw()

    def _draw(self) -> None:
        width, height = self._console.size
        rows = self._flow.take(width)
        live = [self._flow.growing, Text(), *self._panel(width)]
        if len(live) >= height:  # on a screen of a few rows the text matters most
            live = live[:1]
        up = f"\x1b[{len(live) - 1}A" if len(live) > 1 else ""
        self._write(ERASE_BELOW + self._rendered([*rows, *live]).removesuffix("\n") + "\r" + up)
        self._drawn_at = self._clock()

    def _finish(self) -> None:
        rows = self._flow.take(self._console.width)
        if not self.empty:
            rows.append(self._flow.growing)
        self._write(ERASE_BELOW + self._rendered(rows))

    def _rendered(self, rows: list[Text]) -> str:
        with self._console.capture() as capture:
            for row in rows:
                self._console.print(row, soft_wrap=True, markup=False, highlight=False, emoji=False)
        return capture.get()

    def _write(self, codes: str) -> None:
        """Write a refresh in one piece, so that nothing flickers."""
        self._console.file.write(codes)
        self._console.file.flush()
