"""Text of a model wrapped into rows while it still grows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.cells import get_character_cell_size
from rich.text import Text

from medusa_chat.terminal.fences import Fences
from medusa_chat.terminal.theme import LABEL
from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from rich.style import Style

IDEOGRAPH = (
    r"[\u2e80-\u303f\u3040-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
STAYS = r"[\u0300-\u036f\u200d\ufe0f、。，．！？：；」』）】》〉]"  # may not begin a row
# A row never breaks inside an atom: an ideograph, or a run of other letters.
# A space stays at the end of its row, even beyond the last column.
ATOM = re.compile(rf"(?P<space>\s+)|{IDEOGRAPH}{STAYS}*|(?:(?!{IDEOGRAPH})\S)+{STAYS}*")
JOINER, EMOJI_SELECTOR = "\u200d", "\ufe0f"


def escape_controls(text: str) -> str:
    r"""Show control characters as escapes, such as a newline as \n."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _is_single(text: str) -> bool:
    """Tell, of most text, that each character takes one column."""
    return text.isascii() and text.isprintable()


def cells(text: str) -> int:
    """Count the columns of `text`: an upper bound, as terminals differ on joined emoji."""
    if _is_single(text):
        return len(text)
    return sum(1 if char == EMOJI_SELECTOR else get_character_cell_size(char) for char in text)


def breaks(line: str, width: int) -> list[int]:
    """Find the places at which a line without newlines is cut into rows.

    A row ends between words, and inside a word only if the word is wider than a row. A cut never
    depends on text beyond the word after it, so a growing line is cut like the whole one.
    """
    cuts: list[int] = []
    column = 0
    single = _is_single(line)
    for atom in ATOM.finditer(line):
        start, end = atom.span()
        size = end - start if single else cells(line[start:end])
        if atom.lastgroup == "space":
            column += size
            continue
        if column and column + size > width:
            cuts.append(start)
            column = 0
        if size <= width:
            column += size
        else:
            column = _fold(line, start, end, width, cuts)
    return cuts


def _fold(line: str, start: int, end: int, width: int, cuts: list[int]) -> int:
    """Cut the word line[start:end] wherever a row is full; return the column at its end."""
    column = 0
    for index in range(start, end):
        size = cells(line[index])
        if column and column + size > width and line[index - 1] != JOINER:
            cuts.append(index)
            column = 0
        column += size
    return column


class Flow:
    """A growing reply as rows: those that are finished, and the one that still grows.

    A line of code is one row, however long: only the terminal wraps it.
    """

    def __init__(self) -> None:
        self._tail = Text()  # from the start of the growing row on
        self._fed: list[tuple[str, Style | None]] = []  # what `take` adds to it
        self._held = ""  # trailing white space, printed only when something follows it
        self._begun = False
        self._fences = Fences()
        self._fresh = True  # the growing row begins a line
        self._live = [Text()]

    def feed(self, text: str, style: Style, mark: str = "") -> None:
        """Add a piece of the reply; `mark` follows its last visible character."""
        safe = sanitize(text)
        visible = safe.strip()
        if not visible:
            self._held += safe
            return
        start = safe.index(visible)
        if self._begun:
            self._fed.append((self._held + safe[:start], None))
        self._begun = True
        self._fed.append((visible + mark, style))
        self._held = safe[start + len(visible) :]

    def take(self, width: int, room: int = 1) -> list[Text]:
        """Return the rows that were finished since the last call.

        Args:
            width: of the screen.
            room: rows that a growing line of code may take.
        """
        self._tail.append_tokens(self._fed)
        self._fed.clear()
        *finished, growing = self._tail.split("\n", allow_blank=True)
        rows: list[Text] = []
        for line in finished:
            rows += self._rows(line, width)
            if self._fresh:
                self._fences.add(line.plain)
            self._fresh = True
        *complete, self._tail = self._rows(growing, width)
        self._fresh = self._fresh and not complete
        self._live = wrapped(self._tail, width)[-room:] if self._fences.open else [self._tail]
        rows += complete
        for row in rows:
            row.rstrip()
        return rows

    def _rows(self, line: Text, width: int) -> list[Text]:
        return [line] if self._fences.open else [*line.divide(breaks(line.plain, width))]

    @property
    def growing(self) -> Text:
        """The row that still grows; call `take` first."""
        return self._tail

    @property
    def live(self) -> list[Text]:
        """The rows that still grow; call `take` first."""
        return self._live

    def rest(self, width: int, note: str = "") -> list[Text]:
        """Return what is left of a reply that has ended, and a note about its end."""
        if note:
            self.feed(f" {note}", LABEL)
        rows = self.take(width)
        return [*rows, self._tail] if self._tail.plain.strip() else rows


def wrapped(text: Text, width: int) -> list[Text]:
    """Wrap text into rows; an end of a line stays one."""
    rows: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        rows += line.divide(breaks(line.plain, width))
    for row in rows:
        row.rstrip()
    return rows
