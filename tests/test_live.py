"""Rows that are drawn again and again."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style
from rich.text import Span, Text

from medusa_chat.terminal.live import rendered
from medusa_chat.terminal.output import SafeConsole

STYLES: list[str | Style] = [
    "",
    "bold",
    Style(color="#2c64ed"),
    Style(color="red", underline=True),
    Style(dim=True),
    Style(italic=True, color="#00879a"),
]
TEXTS = st.text(st.sampled_from("ab 你é[red]:x:\x07\u202e"), max_size=12)


@st.composite
def rows(draw: st.DrawFn) -> Text:
    """A row whose spans may be nested and overlap."""
    text = Text(draw(TEXTS), draw(st.sampled_from(STYLES)))
    for _ in range(draw(st.integers(0, 4)) if text.plain else 0):
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, len(text)))
        text.spans.append(Span(start, end, draw(st.sampled_from(STYLES))))
    return text


@given(
    st.lists(rows(), min_size=1, max_size=4),
    st.sampled_from((None, "truecolor")),  # a style of rich keeps the codes of its first system
    st.booleans(),
)
def test_rows_are_rendered_as_the_console_prints_them(
    shown: list[Text], colours: str | None, no_color: bool
) -> None:
    console = SafeConsole(
        file=io.StringIO(),
        force_terminal=True,
        color_system=colours,
        no_color=no_color,
        width=40,
    )
    with console.capture() as capture:
        for row in shown:
            console.print(row, soft_wrap=True, highlight=False)
    assert visible(rendered(console, shown)) == visible(capture.get())


def visible(codes: str) -> list[tuple[str, str]]:
    """Each character beside the codes in force, however they are split."""
    found: list[tuple[str, str]] = []
    style = ""
    at = 0
    while at < len(codes):
        if codes[at] == "\x1b":
            end = codes.index("m", at)
            style = codes[at + 2 : end]
            at = end + 1
            continue
        found.append((codes[at], "" if style == "0" else style))
        at += 1
    return found
