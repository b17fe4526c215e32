"""A reply in Markdown as it grows: each block is rendered once, when it ends."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from rich.text import Text

from medusa_chat.terminal.rendering import fence_closed, is_plain_line, parse, render
from medusa_chat.terminal.source import GUARD, PLAIN_INK, Source
from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.wrapping import breaks, wrapped
from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from rich.style import Style

    from medusa_chat.config import View

MARKUP = frozenset("*_`[]<&\\~|")  # a row without these is already as it will be rendered
ONE_LINE = ("heading", "hr")


class Block(NamedTuple):
    """A block of the growing text: its kind, its lines, and whether more text can change it."""

    kind: str
    start: int
    end: int
    closed: bool


def blocks(text: str) -> list[Block]:
    """Split Markdown into its outermost blocks; each item of an outermost list is one."""
    if is_plain_line(text):
        return [Block("paragraph", 0, 1, closed=False)]
    found: list[Block] = []
    complete = text.count("\n")
    for token in parse(text):
        outermost = token.level == 0 and token.nesting >= 0 and "list" not in token.type
        if token.map is None or not (
            outermost or (token.level == 1 and token.type == "list_item_open")
        ):
            continue
        kind = token.type.removesuffix("_open")
        start, end = token.map
        closed = end < complete or (kind in ONE_LINE and end <= complete)
        if kind == "fence":
            closed = end <= complete and fence_closed((start, end), token.content)
        elif kind in ("list_item", "code_block"):
            closed = False  # a blank line does not end it
        found.append(Block(kind, start, end, closed))
    return found


class MarkdownFlow:
    """A growing reply as rows, like `Flow`: rendered blocks, and the block that still grows.

    A row, once returned by `take`, never changes. The growing block is shown as the model writes
    it. Of a paragraph without markup finished rows are returned at once. So are, of a paragraph or
    of code that is taller than the room left for it, the rows above the room.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._source = Source()  # from the start of the growing block on
        self._code = ""  # what was shown of the growing block, if that is code
        self._begun = False
        self._gap = False  # a blank row comes before the next one
        self._live = [Text()]

    def feed(self, text: str, style: Style, mark: str = "") -> None:
        """Add a piece of the reply; `mark` follows its last visible character."""
        safe = sanitize(text)
        if not self._begun and not self._source.text:
            safe = safe.lstrip("\n")  # a reply begins with a word, not with blank rows
        self._source.add(safe, style, mark)

    def take(self, width: int, room: int = 1) -> list[Text]:
        """Return the rows that were finished since the last call.

        Args:
            width: of the screen.
            room: rows that the growing block may take.
        """
        rows = self._finished(width)
        rows += self._finished_part(width, room)
        self._live = self._growing(width)[-room:]
        return rows

    @property
    def live(self) -> list[Text]:
        """The rows that still grow; call `take` first."""
        return self._live

    def rest(self, width: int, note: str = "") -> list[Text]:
        """Return what is left of a reply that has ended, and a note about its end."""
        rows = self._finished(width)
        if self._source.text.strip():
            rows += self._rendered(len(self._source.text), width)
        return [*rows, Text(note, LABEL)] if note else rows

    def _finished(self, width: int) -> list[Text]:
        """Return the rows of all blocks that have ended."""
        found = blocks(self._source.text)
        offsets = _line_offsets(self._source.text)
        ends = [block.start for block in found[1:]]
        if found and found[-1].closed:
            ends.append(found[-1].end)
        rows: list[Text] = []
        begin = 0
        for end in ends:
            rows += self._rendered(offsets[end] - begin, width)
            begin = offsets[end]
        return rows

    def _finished_part(self, width: int, room: int) -> list[Text]:
        """Return the rows of the growing block that will not change, or that have no room."""
        found = blocks(self._source.text)
        if not found:
            return []
        if found[-1].kind == "paragraph":
            return self._finished_words(width, room)
        if found[-1].kind == "fence":
            return self._finished_code(width, room)
        return []

    def _finished_words(self, width: int, room: int) -> list[Text]:
        text = self._source.text
        starts = _row_starts(text.rstrip(), width)
        ready = max(0, len(starts) - room)
        for start, end in zip(starts[ready:], starts[ready + 1 :], strict=False):
            if MARKUP.intersection(text[start:end]):
                break
            ready += 1
        if not ready:
            return []
        cut = starts[ready]
        wrapped_row = text[cut - 1] != "\n"
        rows = self._rendered(cut, width)
        if wrapped_row:
            self._source = Source(GUARD, [PLAIN_INK]).plus(self._source)
        return rows

    def _finished_code(self, width: int, room: int) -> list[Text]:
        if len(self._growing(width)) <= room:
            return []
        end = self._source.text.rindex("\n") + 1
        opening = self._source.text.lstrip("\n").index("\n") + 1
        lead = len(self._source.text) - len(self._source.text.lstrip("\n"))
        fence = self._source.part(lead, lead + opening)
        code = self._source.text[lead + opening : end]
        if not code:
            return []
        shown = self._code + code
        rows = self._rendered(end, width)
        self._code = shown
        self._source = fence.plus(self._source)
        self._gap = False
        return rows

    def _rendered(self, length: int, width: int) -> list[Text]:
        """Render and drop the first `length` characters of the growing text."""
        part = self._source.part(0, length)
        self._source = self._source.part(length)
        rows = [*self._space(part.text), *render(part, width, self._view, self._code)]
        trailing = part.text[len(part.text.rstrip()) :]
        self._gap = trailing.count("\n") > 1
        self._begun = True
        self._code = ""
        return rows

    def _space(self, text: str) -> list[Text]:
        """Return the blank row that the source has before `text`, if there is one."""
        blank = self._gap or text.startswith("\n")
        return [Text()] if blank and self._begun and not self._code else []

    def _growing(self, width: int) -> list[Text]:
        """Return the growing block as the model writes it."""
        text = self._source.text
        start = len(text) - len(text.lstrip("\n"))
        if self._code:
            start = text.index("\n", start) + 1
        end = len(text.rstrip())
        if end <= start:
            return [Text()]
        raw = self._source.part(start, end).raw()
        return [*self._space(text), *wrapped(raw, width)]


def _line_offsets(text: str) -> list[int]:
    """Return the place at which each line begins, and the end of the text."""
    lengths = (len(line) + 1 for line in text.split("\n"))
    return [min(offset, len(text)) for offset in accumulate(lengths, initial=0)]


def _row_starts(text: str, width: int) -> list[int]:
    """Return the place at which each wrapped row of a text begins."""
    starts: list[int] = []
    offset = 0
    for line in text.split("\n"):
        starts += [offset, *(offset + cut for cut in breaks(line, width))]
        offset += len(line) + 1
    return starts
