"""Text of a reply whose every character knows the style of the head that proposed it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from medusa_chat.config import View

# Stands before text that goes on in the middle of a paragraph, so that it begins no list.
GUARD = "\N{WORD JOINER}"
PLAIN = Style.null()

Ink = tuple[Style, str]  # of a character: the style of its head, and the mark after it
PLAIN_INK: Ink = (PLAIN, "")


@dataclass
class Source:
    """Markdown as the model wrote it. `inks` has an entry for each character of `text`."""

    text: str = ""
    inks: list[Ink] = field(default_factory=list)

    def add(self, text: str, style: Style = PLAIN, mark: str = "") -> None:
        """Append text of one token; `mark` follows its last visible character."""
        self.text += text
        self.inks += [(style, "")] * len(text)
        visible = len(text.rstrip())
        if mark and visible:
            self.inks[len(self.inks) - len(text) + visible - 1] = (style, mark)

    def plus(self, other: Source) -> Source:
        """Return this text with another one after it."""
        return Source(self.text + other.text, self.inks + other.inks)

    def part(self, start: int, end: int | None = None) -> Source:
        """Return the characters from `start` to `end`."""
        return Source(self.text[start:end], self.inks[start:end])

    def raw(self) -> Text:
        """Return the text as it is, coloured by head."""
        return self.styled(0, len(self.text), PLAIN, "heads")

    def styled(self, start: int, end: int, extra: Style, view: View) -> Text:
        """Return a part in the style of its element, and in those of the heads if they are shown.

        Colours are those of the heads where these are shown: a colour has one meaning in a view.
        """
        shape = extra.without_color
        pieces: list[tuple[str, Style]] = []
        for (ink, mark), run in groupby(self.inks[start:end]):
            stop = start + len([*run])
            style = ink + shape if shape else ink
            if view == "markdown":
                style = extra
            pieces.append((self.text[start:stop].replace(GUARD, "") + mark, style))
            start = stop
        return Text().append_tokens(pieces)
