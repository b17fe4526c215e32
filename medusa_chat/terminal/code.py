"""Code coloured by Pygments. The colours are readable on dark and light screens.

The view of heads and Markdown takes the weights alone: its colours are those of the heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.style import Style

if TYPE_CHECKING:
    from collections.abc import Iterator

PURPLE, GREEN, ORANGE, BLUE, BROWN = "#b95796", "#1a9e68", "#e37814", "#2c64ed", "#87651a"
GREY = "#808080"
STYLES = {
    "Comment": Style(color=GREY, italic=True),
    "Keyword": Style(color=PURPLE, bold=True),
    "Operator.Word": Style(color=PURPLE, bold=True),
    "Literal.String": Style(color=GREEN),
    "Literal.Number": Style(color=ORANGE),
    "Name.Builtin": Style(color=BROWN),
    "Name.Class": Style(color=BLUE),
    "Name.Decorator": Style(color=BLUE),
    "Name.Function": Style(color=BLUE),
    "Name.Tag": Style(color=BLUE),
}

Run = tuple[str, Style]


def highlight(code: str, language: str) -> list[list[Run]]:
    """Split code into lines of runs, each with its style; an unknown language has none."""
    lines: list[list[Run]] = [[]]
    for kind, value in _lexed(code, language):
        style = _style(kind)
        first, *others = value.split("\n")
        lines[-1].append((first, style))
        lines += [[(other, style)] for other in others]
    return lines


def _lexed(code: str, language: str) -> Iterator[tuple[Any, str]]:
    from pygments.lexers import get_lexer_by_name  # takes 50 ms: only once there is code
    from pygments.lexers.special import TextLexer
    from pygments.util import ClassNotFound

    options = {"stripnl": False, "ensurenl": False}
    try:
        lexer = get_lexer_by_name(language, **options)
    except ClassNotFound:
        lexer = TextLexer(**options)
    yield from lexer.get_tokens(code)


def _style(kind: Any) -> Style:
    """Return the style of a kind of Pygments, or of the nearest kind that includes it."""
    while kind:
        found = STYLES.get(".".join(kind))
        if found:
            return found
        kind = kind.parent
    return Style.null()
