"""Colours and marks of the heads, and the legend that explains them."""

from __future__ import annotations

from functools import cache

from rich.style import Style
from rich.text import Text

from medusa_chat.events import COPIED

# The hues of Okabe and Ito's palette at another lightness. Each keeps a contrast of at least
# 3 to 1 on white and on dark, and stays distinct for colour-blind users (test_view checks both).
HEAD_COLOURS = ("#2c64ed", "#e37814", "#1a9e68", "#b95796", "#87651a")
COPIED_COLOUR = "#00879a"  # cyan on a screen of 16 colours, where grey may be the background
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

LABEL = Style(dim=True)
VALUE = Style()
STRONG = Style(bold=True)
NOTICE = Style(color="yellow", dim=True)
ERROR = Style(color="red")


@cache
def head_style(head: int) -> Style:
    """Return the style of a head's tokens; heads beyond the palette repeat it underlined."""
    if head == COPIED:
        return Style(color=COPIED_COLOUR, italic=True)
    if head == 0:
        return Style.null()
    rounds, index = divmod(head - 1, len(HEAD_COLOURS))
    return Style(color=HEAD_COLOURS[index], underline=True if rounds else None)


def head_mark(head: int) -> str:
    """Return the mark after a head's token for screens without colour; "" for the LM head."""
    if head == COPIED:
        return "ᶜ"
    return str(head).translate(SUPERSCRIPTS) if head else ""


def head_name(head: int) -> str:
    """Name a head as tables and the legend do."""
    if head == COPIED:
        return "copied"
    return f"head {head}" if head else "LM head"


def legend(heads: int, *, marks: bool = False, colour: bool = True, copied: bool = False) -> Text:
    """Explain the colours in one line of words: who proposed a token, and how far ahead."""
    shown = [*range(heads + 1)]
    if copied:
        shown.append(COPIED)
    # One space: with five heads and copies the line has 78 cells.
    line = Text(" ").join(_entry(head, marks) for head in shown)
    if not colour and not marks:
        line.append("\ncolours are off: /marks on shows which head proposed a token", LABEL)
    return line


def _entry(head: int, marks: bool) -> Text:
    # Only the first head is spelled out, for the same reason.
    name = {COPIED: "copied", 0: "the model", 1: "guessed 1 ahead"}.get(head, f"{head} ahead")
    style = head_style(head)
    mark = head_mark(head) if marks else ""
    return Text.assemble(("■ ", style), (name, LABEL), (mark, style))
