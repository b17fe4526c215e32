"""Rows that are drawn again and again below what was printed."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import COLOR_SYSTEMS
from rich.style import Style
from rich.text import Text

from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console

REFRESH_SECONDS = 0.05
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
ERASE_BELOW = "\r\x1b[J"
NO_STYLE = Style.null()

Rows = Callable[[int, int], list[Text]]  # width, height of the screen -> rows


def rendered(console: Console, rows: Iterable[Text]) -> str:
    """Render rows, each with a newline, as the console would print them without wrapping.

    The console's own way takes three times as long, which is felt where a model is fast.
    """
    colours = COLOR_SYSTEMS.get(console.color_system or "")
    pieces: list[str] = []
    for row in rows:
        for text, style in _runs(console, row):
            shown = style.without_color if console.no_color else style
            pieces.append(shown.render(sanitize(text), color_system=colours))
        pieces.append("\n")
    return "".join(pieces)


def _runs(console: Console, row: Text) -> Iterator[tuple[str, Style]]:
    """Cut a row where its style changes."""
    if any(one.end > other.start for one, other in pairwise(row.spans)):
        yield from ((text, style or NO_STYLE) for text, style, _ in row.render(console))
        return
    plain, base, end = row.plain, console.get_style(row.style), 0
    for span in row.spans:
        yield plain[end : span.start], base
        style = console.get_style(span.style)
        yield plain[span.start : span.end], base + style if row.style else style
        end = span.end
    yield plain[end:], base


def update(finished: str, live: str, count: int) -> str:
    """Return the codes that print finished rows and leave `count` live ones below the cursor.

    Between two refreshes the cursor waits at the start of the first live row. A terminal keeps it
    there when it is resized, so erasing from the cursor down is always exact. (rich's Live waits
    below its last row: a narrower terminal then leaves remains on the screen.)
    """
    up = f"\x1b[{count - 1}A" if count > 1 else ""
    return ERASE_BELOW + (finished + live).removesuffix("\n") + "\r" + up


class LiveRows:
    """Context manager that draws rows and takes them away at its end.

    Two refreshes are at least REFRESH_SECONDS apart.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._drawn_at = 0.0

    def __enter__(self) -> LiveRows:
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """Take over the screen from the cursor down."""
        self._write(HIDE_CURSOR)

    def leave(self) -> None:
        """Leave the screen to what comes next."""
        self._write(ERASE_BELOW + SHOW_CURSOR)

    def draw(self, rows: Rows, *, now: bool = False) -> None:
        """Draw the rows that `rows` returns, if the last refresh is long enough ago or `now`."""
        if not now and time.monotonic() - self._drawn_at < REFRESH_SECONDS:
            return
        width, height = self._console.size
        shown = rows(width, height)[-max(height - 1, 1) :]
        self._write(update("", rendered(self._console, shown), len(shown)))
        self._drawn_at = time.monotonic()

    def _write(self, codes: str) -> None:
        """Write a refresh in one piece, so that nothing flickers."""
        self._console.file.write(codes)
        self._console.file.flush()
