"""Text of a model made safe for a terminal, and wrapped into rows while it still grows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.cells import get_character_cell_size
from rich.text import Text

if TYPE_CHECKING:
    from rich.style import Style

TAB = "    "
ESCAPE_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\)|[ -/]*[0-~])", re.DOTALL
)
LINE_END = re.compile(r"\r\n|[\u2028\u2029]")
# control characters, marks that reorder what follows them, halves of surrogate pairs (no terminal takes those)
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SURROGATE = re.compile(r"[\ud800-\udfff]")

IDEOGRAPH = (
    r"[\u2e80-\u303f\u3040-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
STAYS = r"[\u0300-\u036f\u200d\ufe0f、。，．！？：；」』）】》〉]"  # may not begin a row
# What a row is never broken inside of: an ideograph, or a run of other letters. A space hangs at the row's end.
ATOM = re.compile(rf"(?P<space>\s+)|{IDEOGRAPH}{STAYS}*|(?:(?!{IDEOGRAPH})\S)+{STAYS}*")
JOINER, EMOJI_SELECTOR = "\u200d", "\ufe0f"


def sanitize(text: str) -> str:
    """`text` without escape sequences and control characters; newlines stay, a tab becomes spaces."""
    text = LINE_END.sub("\n", ESCAPE_SEQUENCE.sub("", text)).replace("\t", TAB)
    return SURROGATE.sub("\N{REPLACEMENT CHARACTER}", UNSAFE.sub("", text))


def cells(text: str) -> int:
    """Columns that `text` may take: an upper bound, as terminals differ on joined emoji."""
    return sum(1 if char == EMOJI_SELECTOR else get_character_cell_size(char) for char in text)


def breaks(line: str, width: int) -> list[int]:
    """Where a line without newlines is cut into rows: at words; inside a word only if no row holds it.

    What stands before a cut never depends on what follows the word behind it, so a growing line is cut
    where the whole one is.
    """
    cuts: list[int] = []
    column = 0
    for atom in ATOM.finditer(line):
        size = cells(atom.group())
        if atom["space"]:
            column += size
            continue
        if column and column + size > width:
            cuts.append(atom.start())
            column = 0
        if size <= width:
            column += size
        else:
            column = _fold(line, atom.start(), atom.end(), width, cuts)
    return cuts


def _fold(line: str, start: int, end: int, width: int, cuts: list[int]) -> int:
    """Cut the word line[start:end], which begins a row, wherever a row is full; the column it ends in."""
    column = 0
    for index in range(start, end):
        size = cells(line[index])
        if column and column + size > width and line[index - 1] != JOINER:
            cuts.append(index)
            column = 0
        column += size
    return column


class Flow:
    """A reply on its way to the screen: rows that are finished, and the one that still grows."""

    def __init__(self) -> None:
        self._tail = Text()  # from the start of the growing row on
        self._held = ""  # white space at the end: printed only once something follows it
        self._begun = False

    def feed(self, text: str, style: Style, mark: str = "") -> None:
        """Add a piece of the reply; `mark` goes behind its last visible character."""
        visible = sanitize(text).rstrip()
        trailing = sanitize(text)[len(visible) :]
        if not visible:
            self._held += trailing
            return
        lead = len(visible) - len(visible.lstrip())
        space, visible = self._held + visible[:lead], visible[lead:]
        if self._begun:
            self._tail.append(space)
        self._begun = True
        self._tail.append(visible, style).append(mark, style)
        self._held = trailing

    def take(self, width: int) -> list[Text]:
        """The rows that were finished since the last call."""
        lines = self._tail.split("\n", allow_blank=True)
        rows = [row for line in lines for row in line.divide(breaks(line.plain, width))]
        self._tail = rows.pop()
        for row in rows:
            row.rstrip()
        return rows

    @property
    def growing(self) -> Text:
        """The row that still grows; call `take` first."""
        return self._tail
