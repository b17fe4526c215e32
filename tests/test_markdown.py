"""Markdown as it grows: blocks are rendered once, words come once, code is verbatim."""

from __future__ import annotations

import itertools
import random
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style

from medusa_chat.config import VIEWS, View
from medusa_chat.terminal.code import highlight
from medusa_chat.terminal.live import ERASE_BELOW
from medusa_chat.terminal.markdown import MarkdownFlow, blocks
from medusa_chat.terminal.rendering import code_blocks, render
from medusa_chat.terminal.source import Source
from medusa_chat.terminal.theme import head_style
from medusa_chat.terminal.view import ReplyView
from tests.helpers.fake_engine import pieces, script
from tests.test_view import Screen, console, two_rows

if TYPE_CHECKING:
    from rich.text import Text

CODE = '''def quicksort(items):  # a comment that is wider than the screens, longer than all

    """Sort
    them."""
    return [x for x in items if x != "a*b_c*"]
'''
REPLY = f"""# Sorting

Some **bold** and *slanted* words, `inline code`, a [link](http://x.org/a) and 2 * 3.
A second line &amp; more, all of it one paragraph that is long enough to be wrapped into rows.

1. first
2. second
   - nested

   ```sh
   ls -la
   ```
3. third

```python
{CODE}```
> a **quote**

| name | speed |
| --- | ---: |
| greedy | **5.0** |

---
The end <b>html</b> \\*stars\\*."""
RENDERED = """Sorting

Some bold and slanted words, inline code, a link (http://x.org/a) and 2 * 3.
A second line & more, all of it one paragraph that is long enough to be wrapped
into rows.

1. first
2. second
   • nested

   ```sh
   ls -la
   ```
3. third

```python
CODE```
▎ a quote

name     speed
──────────────
greedy     5.0

────────────────────────────────────────
The end <b>html</b> *stars*."""


def grown(text: str, width: int, room: int, view: View = "markdown", seed: int = 0) -> list[Text]:
    """Feed a reply in random pieces; return its rows."""
    draw = random.Random(seed)
    flow = MarkdownFlow(view)
    rows: list[Text] = []
    place = 0
    while place < len(text):
        size = draw.randint(1, 9)
        flow.feed(text[place : place + size], head_style(draw.randrange(5)))
        place += size
        rows += flow.take(width, room)
        assert 1 <= len(flow.live) <= room
    return [*rows, *flow.rest(width)]


def plain(rows: list[Text]) -> str:
    return "\n".join(row.plain for row in rows)


@pytest.mark.parametrize("view", ["markdown", "both"])
def test_every_kind_of_block_is_rendered(view: View) -> None:
    expected = RENDERED.replace("CODE", CODE).replace("•", "◦")
    assert plain(grown(REPLY, 80, 40, view)) == expected


def test_styles() -> None:
    rows = render(Source(REPLY, [(Style(), "")] * len(REPLY)), 100, "markdown")
    assert style_of(rows, "Sorting").bold
    assert style_of(rows, "bold").bold
    assert style_of(rows, "slanted").italic
    assert style_of(rows, "inline code").color
    assert style_of(rows, "def").color
    assert style_of(rows, "def") != style_of(rows, "quicksort")


def style_of(rows: list[Text], word: str) -> Style:
    row = next(row for row in rows if word in row.plain)
    at = row.plain.index(word)
    spans = [span.style for span in row.spans if span.start <= at < span.end]
    return Style.combine([Style(), *(style for style in spans if isinstance(style, Style))])


def test_the_views_differ_in_the_colours_of_the_heads() -> None:
    text = "A word and **one more**\n\n```python\ndef f(): pass\n```\n"
    source = Source()
    source.add(text, head_style(1))
    colour = head_style(1).color
    both, markdown = (render(source, 80, view) for view in ("both", "markdown"))
    for word in ("word", "one more", "def", "pass"):
        assert style_of(both, word).color == colour
        assert style_of(markdown, word).color != colour
    assert style_of(both, "one more").bold
    assert style_of(both, "def").bold
    assert style_of(markdown, "def").color is not None


FRAGMENTS = (
    *("word", " ", " ", "\n", "\n", "\n\n", "two words", "**", "*", "_", "`", "```", "```python\n"),
    *("- ", "\n- ", "\n1. ", "  ", "    ", "> ", "# ", "\n## ", "|", "\n| a | b |\n| - | - |\n"),
    *(
        "---",
        "\n---\n",
        "===",
        "[",
        "](u)",
        "<b>",
        "&amp;",
        "\\",
        "!",
        "~~",
        "é",
        "你好",
        "🦊",
        "\t",
    ),
)


@pytest.mark.parametrize("seed", range(150))
def test_every_word_comes_once_and_in_order(seed: int) -> None:
    draw = random.Random(seed)
    numbers = itertools.count(100)
    parts = [f" w{next(numbers)}" + draw.choice(FRAGMENTS) for _ in range(120)]
    text = "".join(parts)
    for view in VIEWS[1:]:
        rows = grown(text, draw.choice([24, 60, 100]), draw.choice([1, 3, 12]), view, seed)
        shown = plain(rows)
        words, expected = re.findall(r"w\d+", shown), re.findall(r"w\d+", text)
        assert sorted(words) == expected
        assert words == expected or "| - |" in text  # cells of a table stand side by side


def test_a_row_that_is_longer_than_its_table_loses_nothing() -> None:
    table = "| a | b |\n| - | - |\n| c | d | e |"
    assert plain(grown(table, 80, 9)) == table


@pytest.mark.parametrize("room", [1, 4, 40])
@pytest.mark.parametrize("width", [20, 60])
def test_code_is_never_wrapped_and_shown_as_it_was_written(width: int, room: int) -> None:
    rows = plain(grown(f"Look:\n```python\n{CODE * 9}```\nDone.", width, room))
    assert rows == f"Look:\n```python\n{CODE * 9}```\nDone."
    assert code_blocks(f"```\n{CODE}```\n- a\n\n      x\n") == [CODE, "x\n"]


def test_tall_code_is_coloured_as_at_once() -> None:
    text = f"```python\n{CODE * 5}```\n"
    at_once = render(Source(text, [(Style(), "")] * len(text)), 60, "markdown")
    bit_by_bit = grown(text, 60, 3)
    for one, other in zip(at_once, bit_by_bit, strict=True):
        for place in range(len(one.plain)):
            assert style_at(one, place) == style_at(other, place)


def style_at(row: Text, place: int) -> Style:
    spans = (span for span in row.spans if span.start <= place < span.end)
    return Style.combine(
        [Style(), *(span.style for span in spans if isinstance(span.style, Style))]
    )


def test_highlighting_keeps_the_code() -> None:
    for language in ("python", "nonsense", "", "html"):
        lines = highlight(CODE, language)
        assert "\n".join("".join(run for run, _ in line) for line in lines) == CODE


def test_a_paragraph_without_markup_is_not_held_back() -> None:
    flow = MarkdownFlow("both")
    rows: list[Text] = []
    for piece in pieces("plain words " * 30):
        flow.feed(piece, Style())
        rows += flow.take(30, 10)
        assert len(flow.live) == 1
    assert len(rows) > 10
    flow.feed("- 5 is no list here", Style())
    shown = plain([*rows, *flow.rest(30)])
    assert "•" not in shown


@pytest.mark.parametrize("view", VIEWS[1:])
@pytest.mark.parametrize(("width", "height"), [(30, 12), (80, 24), (20, 6)])
def test_the_screen_only_grows(view: View, width: int, height: int) -> None:
    screen = Screen(width, height)
    clock = itertools.count().__next__
    with ReplyView(console(screen), two_rows, view=view, clock=clock) as shown:
        for step in script(REPLY):
            shown.add(step)
    lines = "".join("".join(line.split()) for line in screen.lines)
    expected = "".join(RENDERED.replace("CODE", CODE).replace("•", "◦").split())
    if width == 80:
        assert lines == expected
    for word in ("quicksort", "nested", "greedy", "second", "html"):
        assert lines.count(word) == 1 + (word == "second")
    assert "speedup" not in lines
    assert ERASE_BELOW not in lines


def test_marks_follow_their_tokens_in_markdown_too() -> None:
    flow = MarkdownFlow("both")
    for text, mark in (("A ", ""), ("**bo", "¹"), ("ld**", "²"), (" end", "³")):
        flow.feed(text, Style(), mark)
    assert plain(flow.rest(80)) == "A bo¹ld end³"


@given(
    st.text(st.sampled_from("ab é你1. -#>=+!:)(\"'*_`[]<&\\~|\n"), max_size=30),
    st.sampled_from(("markdown", "both")),
    st.integers(8, 20),
)
def test_a_line_that_is_not_parsed_is_rendered_as_if_it_were(
    text: str, view: View, width: int
) -> None:
    source = Source()
    for number, char in enumerate(text):
        source.add(char, head_style(number % 3))
    shown = render(source, width, view), blocks(text)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("markdown", "rendering"):
            patch.setattr(f"medusa_chat.terminal.{module}.is_plain_line", lambda _: False)
        assert (render(source, width, view), blocks(text)) == shown
