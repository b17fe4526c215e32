"""Which colour and which mark belong to which head; the legend that says so."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from medusa_chat.events import COPIED

# The hues of Okabe and Ito's palette, their lightness moved so that each keeps a contrast of at least 3 to 1
# on white and on a dark background, and stays apart under each colour deficiency (test_view measures both).
HEAD_COLOURS = ("#2c64ed", "#e37814", "#1a9e68", "#b95796", "#87651a")
COPIED_COLOUR = "#808080"
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

LABEL = Style(dim=True)
VALUE = Style()
STRONG = Style(bold=True)
NOTICE = Style(color="yellow", dim=True)
ERROR = Style(color="red")


def head_style(head: int) -> Style:
    """How a token of `head` is drawn; heads beyond the palette repeat it underlined."""
    if head == COPIED:
        return Style(color=COPIED_COLOUR, italic=True)
    if head == 0:
        return Style.null()
    rounds, index = divmod(head - 1, len(HEAD_COLOURS))
    return Style(color=HEAD_COLOURS[index], underline=True if rounds else None)


def head_mark(head: int) -> str:
    """The mark behind a token of `head` where colours are not to be relied on; none for the LM head."""
    if head == COPIED:
        return "ᶜ"
    return str(head).translate(SUPERSCRIPTS) if head else ""


def head_name(head: int) -> str:
    if head == COPIED:
        return "copied"
    return f"head {head}" if head else "LM head"


def legend(heads: int, *, marks: bool = False, colour: bool = True, copied: bool = False) -> Text:
    """One line: each head's square in its colour, and how far ahead it guesses."""
    entries = [_entry(head, marks) for head in (*range(heads + 1), *([COPIED] if copied else []))]
    line = Text("  ").join(entries)
    if not colour and not marks:
        line.append("\ncolours are off: /marks on shows which head proposed a token", LABEL)
    return line


def _entry(head: int, marks: bool) -> Text:
    ahead = f" (+{head})" if head > 0 else ""
    mark = head_mark(head) if marks else ""
    # no-break spaces: a narrow terminal breaks the line between entries only
    said = str(head) if head > 1 else head_name(head)  # "head" once: the line should fit 80 columns
    name = f"{said}{ahead}".replace(" ", "\N{NO-BREAK SPACE}")
    return Text.assemble(
        ("■\N{NO-BREAK SPACE}", head_style(head)), (name, LABEL), (mark, head_style(head))
    )
