"""A reply as it streams: finished rows scroll away, the last row and the panel are redrawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.terminal.live import (
    ERASE_BELOW,
    HIDE_CURSOR,
    REFRESH_SECONDS,
    SHOW_CURSOR,
    rendered,
    update,
)
from medusa_chat.terminal.markdown import MarkdownFlow
from medusa_chat.terminal.theme import LABEL, head_mark, head_style
from medusa_chat.terminal.thoughts import COMMAND, ThoughtRows, Thoughts
from medusa_chat.terminal.wrapping import Flow
from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from medusa_chat.config import View
    from medusa_chat.events import Step, Token

STOPPED = "[stopped]"

Panel = Callable[[int], list[Text]]  # width -> rows


class ReplyView:
    """Context manager that draws one reply and leaves only its text on the screen.

    `panel` is called at each refresh, `thoughts` returns what tells thoughts from the answer, and
    `marks` adds each token's head in a small digit. `view` tells if Markdown is rendered, block by
    block as each one ends.
    Two refreshes are at least REFRESH_SECONDS of `clock` apart.
    """

    def __init__(
        self,
        console: Console,
        panel: Panel,
        *,
        marks: bool = False,
        view: View = "heads",
        thoughts: Callable[[], Thoughts] = Thoughts,
        open_thoughts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._panel = panel
        self._thoughts = ThoughtRows(thoughts, shown=open_thoughts)
        self._marks = marks
        self._clock = clock
        self._flow = Flow() if view == "heads" else MarkdownFlow(view)
        self._waiting: list[Token] = []  # for the next refresh
        self._stopped = False
        self._drawn_at = 0.0
        self.empty = True

    def __enter__(self) -> ReplyView:
        self._write(HIDE_CURSOR)
        self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            self._finish()
        finally:
            self._write(SHOW_CURSOR)

    def add(self, step: Step) -> None:
        """Add the tokens of a step; redraw if the last refresh is long enough ago.

        Between two refreshes tokens wait: after a step little of this code is in the processor's
        caches, so each of its runs costs several times what it costs in a loop.
        """
        self._waiting += step.tokens
        if self._clock() - self._drawn_at >= REFRESH_SECONDS:
            self._draw()

    def _take_waiting(self) -> None:
        if self._waiting:
            self._feed(self._thoughts.answer(self._waiting))
            self._waiting = []

    def _feed(self, tokens: Iterable[Token]) -> None:
        for token in tokens:
            if token.text:
                mark = head_mark(token.head) if self._marks else ""
                self._flow.feed(token.text, head_style(token.head), mark)
                self.empty = self.empty and not token.text.strip()
        self.empty = self.empty and not self._thoughts.begun

    def suspend(self) -> None:
        """Leave the screen to the shell."""
        self._write(ERASE_BELOW + SHOW_CURSOR)

    def resume(self) -> None:
        """Draw again where the shell left the cursor."""
        self._write(HIDE_CURSOR)
        self._draw()

    def _draw(self) -> None:
        self._take_waiting()
        width, height = self._console.size
        panel = self._panel(width)
        # A terminal that is made much narrower still holds all rows that are redrawn.
        room = max(1, height // 4)
        rows = [*self._thoughts.take(width), *self._flow.take(width, room)]
        growing = self._thoughts.live or self._flow.live
        live = [*growing, Text(), *panel]
        if len(live) >= height:  # on a screen of a few rows the text matters most
            live = growing
        finished = rendered(self._console, rows)
        self._write(update(finished, rendered(self._console, live), len(live)))
        self._drawn_at = self._clock()

    def _finish(self) -> None:
        self._take_waiting()
        self._feed(self._thoughts.rest())
        note = STOPPED if self._stopped and not self.empty else ""
        width = self._console.width
        rows = [*self._thoughts.take(width, final=True), *self._flow.rest(width, note)]
        self._write(ERASE_BELOW + rendered(self._console, rows))

    def _write(self, codes: str) -> None:
        """Write a refresh in one piece, so that nothing flickers."""
        self._console.file.write(codes)
        self._console.file.flush()


class PlainView:
    """Context manager that prints one reply as it comes and redraws nothing.

    It is for screen readers and terminals that cannot move the cursor. White space is printed only
    when something follows it.
    """

    def __init__(
        self,
        console: Console,
        *,
        marks: bool = False,
        thoughts: Callable[[], Thoughts] = Thoughts,
        open_thoughts: bool = False,
    ) -> None:
        self._console = console
        self._marks = marks
        self._thoughts = ThoughtRows(thoughts, shown=open_thoughts, opener=COMMAND)
        self._held = ""
        self.empty = True

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._feed(self._thoughts.rest())
        self._print_thoughts(final=True)
        if self.empty:
            return
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._print(Text(f" {STOPPED}\n" if stopped else "\n", LABEL))

    def add(self, step: Step) -> None:
        """Print the tokens of a step."""
        tokens = [*self._thoughts.answer(step.tokens)]
        self._print_thoughts()
        self._feed(tokens)

    def _print_thoughts(self, *, final: bool = False) -> None:
        for row in self._thoughts.take(self._console.width, final=final):
            self._print(Text("\n").join([row, Text()]))

    def _feed(self, tokens: Iterable[Token]) -> None:
        for token in tokens:
            text = self._held + sanitize(token.text)
            visible = text.rstrip()
            self._held = text[len(visible) :]
            if self.empty:
                visible = visible.lstrip()
            if visible:
                self.empty = False
                mark = head_mark(token.head) if self._marks else ""
                self._print(Text(visible + mark, head_style(token.head)))

    def suspend(self) -> None:
        """Leave the screen to the shell: there is nothing to take away."""

    def resume(self) -> None:
        """Go on where the shell left the cursor."""

    def _print(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)
        self._console.file.flush()
