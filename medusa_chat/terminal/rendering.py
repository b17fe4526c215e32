"""A finished block of Markdown as rows of styled text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from rich import box
from rich.style import Style
from rich.table import Table
from rich.text import Text

from medusa_chat.terminal.code import highlight
from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.source import PLAIN, Source
from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.wrapping import wrapped

if TYPE_CHECKING:
    from collections.abc import Iterable

    from markdown_it.token import Token

    from medusa_chat.config import View

BULLETS = "•◦▪"
BAR = "▎ "
LEAST_WIDTH = 8  # cells that nested blocks keep on a narrow screen
INLINE = {
    "strong": Style(bold=True),
    "em": Style(italic=True),
    "s": Style(strike=True),
    "link": Style(underline=True),
    "image": Style(underline=True),
}
# A line that begins with a letter and holds none of these is a paragraph of plain words: that need
# not be parsed, which is felt where a model is fast.
PLAIN_LINE = re.compile(r"[^\W\d_][^*_`\[\]<&\\~|\n]*")
INLINE_CODE = Style(color="#87651a", bold=True)
HEADINGS = {"h1": Style(bold=True, underline=True)}
HEADING = Style(bold=True)


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    """Make the parser: HTML is text, and a link's definition does not vanish."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return parser.disable(["reference", "text_join"])


@lru_cache(maxsize=1)  # a text is first cut into blocks, then rendered
def parse(text: str) -> list[Token]:
    """Parse Markdown into the tokens of markdown-it."""
    return _parser().parse(text)


def is_plain_line(text: str) -> bool:
    """Tell that a text is one line without any Markdown; not all such lines are recognized."""
    return PLAIN_LINE.fullmatch(text) is not None


def render(source: Source, width: int, view: View, code_before: str = "") -> list[Text]:
    """Render Markdown as rows of at most `width` cells; rows of code are as long as they are.

    Args:
        source: one or more whole blocks.
        width: of the screen.
        view: of heads and Markdown.
        code_before: what was already shown of the code that `source` begins with.
    """
    if is_plain_line(source.text):
        words = source.styled(0, len(source.text.rstrip()), PLAIN, view)
        return wrapped(words, max(width, LEAST_WIDTH))
    return _Renderer(source, view, code_before).rows(SyntaxTreeNode(parse(source.text)), width)


def code_blocks(text: str) -> list[str]:
    """Return the content of each block of code in Markdown."""
    return [each.content for each in parse(text) if each.type in ("fence", "code_block")]


class _Renderer:
    def __init__(self, source: Source, view: View, code_before: str) -> None:
        self._source = source
        self._view = view
        self._code_before = code_before
        self._lines = source.text.split("\n")
        self._place = 0  # in the source, after what was rendered last
        self._depth = 0  # of lists

    def rows(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        """Render the blocks inside a node, with a blank row where the source has one."""
        rows: list[Text] = []
        for child in node.children:
            if rows and child.map and not self._lines[child.map[0] - 1].strip("> \t"):
                rows.append(Text())
            rows += self._block(child, max(width, LEAST_WIDTH))
        return rows

    def _block(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        if node.type in ("paragraph", "heading"):
            return wrapped(self._inline(node, HEADINGS.get(node.tag, _heading(node))), width)
        if node.type in ("bullet_list", "ordered_list"):
            return self._list(node, width)
        if node.type == "blockquote":
            bar = Text(BAR, LABEL)
            return _prefixed(self.rows(node, width - len(BAR)), bar, bar)
        if node.type in ("fence", "code_block"):
            return self._code(node)
        if node.type == "table":
            return self._table(node, width)
        return [Text("─" * min(width, 40), LABEL)]  # a thematic break

    def _list(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        rows: list[Text] = []
        number = int(node.attrs.get("start", 1))
        self._depth += 1
        for item in node.children:
            if rows and item.map and not self._lines[item.map[0] - 1].strip():
                rows.append(Text())
            marker = f"{number}. " if node.type == "ordered_list" else self._bullet()
            indent = " " * len(marker)
            content = self.rows(item, width - len(marker)) or [Text()]
            rows += _prefixed(content, Text(marker, LABEL), Text(indent))
            number += 1
        self._depth -= 1
        return rows

    def _bullet(self) -> str:
        return BULLETS[(self._depth - 1) % len(BULLETS)] + " "

    def _code(self, node: SyntaxTreeNode) -> list[Text]:
        """Colour code line by line; a row of code is a line, however long."""
        language = node.info.split(None, 1)[0] if node.info.strip() else ""
        self._find(node.info)
        lines = highlight(self._code_before + node.content.removesuffix("\n"), language)
        shown = lines[self._code_before.count("\n") :] if node.content else []
        rows = [Text().join(self._piece(run, style) for run, style in line) for line in shown]
        if node.type == "code_block":
            return rows
        opening = [] if self._code_before else [Text(f"```{node.info}", LABEL)]
        closing = [Text("```", LABEL)] if self._closed(node) else []
        return [*opening, *rows, *closing]

    def _closed(self, node: SyntaxTreeNode) -> bool:
        assert node.map
        return fence_closed(node.map, node.content)

    def _table(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        assert node.map
        lines = self._lines[slice(*node.map)]
        cells = [cell for part in node.children for row in part.children for cell in row.children]
        shown = "".join(child.content for cell in cells for child in cell.children)
        if _letters(shown) != _letters("".join(lines)):  # a row is longer than the header
            text = Text("\n").join(self._piece(line.strip(), PLAIN) for line in lines)
            return wrapped(text, width)
        table = Table(box=box.SIMPLE_HEAD, border_style=LABEL, show_edge=False, pad_edge=False)
        header, *body = [row for part in node.children for row in part.children]
        for cell in header.children:
            side = str(cell.attrs.get("style", "")).removeprefix("text-align:")
            justify = {"right": "right", "center": "center"}.get(side, "left")
            content = self._inline(cell, HEADING)
            table.add_column(content, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in body:
            table.add_row(*(self._inline(cell, PLAIN) for cell in row.children))
        return _drawn(table, width)

    def _inline(self, node: SyntaxTreeNode, style: Style) -> Text:
        """Join the words inside a paragraph, a heading or a cell."""
        words = [self._word(child, style) for child in node.children]
        return words[0] if len(words) == 1 else Text().join(words)

    def _word(self, node: SyntaxTreeNode, style: Style) -> Text:
        if node.type in ("softbreak", "hardbreak"):
            return Text("\n")
        if node.type == "code_inline":
            return self._piece(node.content, style + INLINE_CODE)
        if node.type in ("text", "text_special"):
            return self._piece(node.content, style)
        text = self._inline(node, style + INLINE.get(node.type, PLAIN))
        address = str(node.attrs.get("href") or node.attrs.get("src") or "")
        if address and address != text.plain:
            text.append(f" ({address})", LABEL)
            self._find(address)
        return text

    def _piece(self, content: str, style: Style) -> Text:
        """Return content of the source with the styles of its heads."""
        start = self._find(content)
        if start is None:  # markdown-it changed it, as in an entity
            return Text(content, style)
        return self._source.styled(start, start + len(content), style, self._view)

    def _find(self, content: str) -> int | None:
        """Find the next place of some content, and go on behind it."""
        start = self._source.text.find(content, self._place)
        if start < 0:
            return None
        self._place = start + len(content)
        return start


def fence_closed(lines: tuple[int, int], content: str) -> bool:
    """Tell if a fenced block of these lines of the source has its closing fence."""
    return lines[1] - lines[0] > content.count("\n") + 1


def _letters(text: str) -> int:
    return sum(map(str.isalnum, text))


def _heading(node: SyntaxTreeNode) -> Style:
    return HEADING if node.type == "heading" else PLAIN


def _prefixed(rows: Iterable[Text], first: Text, others: Text) -> list[Text]:
    prefixed = [Text.assemble(others if index else first, row) for index, row in enumerate(rows)]
    for row in prefixed:
        if not row.plain.strip():
            row.rstrip()
    return prefixed


def _drawn(table: Table, width: int) -> list[Text]:
    """Draw a table as rows of text."""
    console = SafeConsole(width=width, highlight=False)
    lines = console.render_lines(table, console.options, pad=False)
    rows = [Text.assemble(*((each.text, each.style or PLAIN) for each in line)) for line in lines]
    for row in rows:
        row.rstrip()
    return rows
