"""Draw the pictures of docs/chat.md: real chats in a pseudo-terminal, as SVG.

    python -m benchmarks.pictures [--out docs/pictures] [NAME ...]

The bundled model speaks where figures are shown. Code and tables, which it cannot write, come from
the tests' scripted engine.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text

from tests.helpers.pseudo_terminal import ROOT, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable

OUT = ROOT / "docs" / "pictures"
QUESTION = "Tell me a fairy tale."
LIST = "List five things to take on a camping trip."
CODE = """Here is the **Fibonacci** sequence:

```python
def fibonacci(count: int) -> list[int]:
    \"\"\"Return the first numbers.\"\"\"
    numbers = [0, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])  # the sum of the two before
    return numbers[:count]
```

| count | result        |
| ----: | ------------- |
|     3 | `[0, 1, 1]`   |
|     4 | `[0, 1, 1, 2]` |

1. It starts with *two* numbers.
2. Each next one is their sum.
"""
THINKING = "<think>The user wants the capital of France. That is Paris.</think>Paris."
BUNDLED = ("-m", "medusa_chat.cli")
FAKE = (str(ROOT / "tests" / "helpers" / "fake_engine.py"), "--delay", "0.01")


@dataclass(frozen=True)
class Picture:
    """A chat that is photographed when `act` returns."""

    name: str
    command: tuple[str, ...]
    act: Callable[[Terminal], object]
    columns: int = 90
    rows: int = 40
    light: bool = False


class Screen(pyte.HistoryScreen):
    """A screen that knows dim text, which pyte does not: it is kept as blinking text."""

    def select_graphic_rendition(self, *attributes: int, **settings: Any) -> None:
        """Take the codes of a style; a 2 that belongs to a colour stays as it is."""
        codes = list(attributes)
        place = 0
        while place < len(codes):
            if codes[place] in (38, 48):
                place += 5 if codes[place + 1 : place + 2] == [2] else 3
                continue
            codes[place] = {2: 5, 22: 25}.get(codes[place], codes[place])
            place += 1
        super().select_graphic_rendition(*codes, **settings)


def greeted(terminal: Terminal) -> None:
    terminal.see("■ 4 ahead")
    rested(terminal)


def rested(terminal: Terminal) -> None:
    """Wait for the prompt and its toolbar."""
    terminal.see(lambda text: terminal.at_prompt and bool(re.search(r"\d+/\d+ tokens", text)))


def answered(question: str) -> Callable[[Terminal], None]:
    def act(terminal: Terminal) -> None:
        greeted(terminal)
        terminal.say(question)
        terminal.replies(1)
        rested(terminal)

    return act


def raced(terminal: Terminal) -> None:
    greeted(terminal)
    terminal.say(f"/race {QUESTION}")
    terminal.see(" against ")
    rested(terminal)


def listed(terminal: Terminal) -> None:
    name = "The woodcutter"
    answered(QUESTION)(terminal)
    for line in (f"/name {name}", "/reset", "How are you today?"):
        terminal.say(line)
        rested(terminal)
    terminal.say("/chats")
    terminal.see(lambda text: text.count(name) == 3)  # typed, confirmed, listed
    rested(terminal)


def answered_plainly(terminal: Terminal) -> None:
    terminal.see("\n>")
    terminal.send(f"{QUESTION}\r")
    terminal.see("tokens per step")
    terminal.see(lambda text: text.rstrip().endswith(">"))


def viewed(view: str) -> Picture:
    command = (*FAKE, "--view", view, "--reply", CODE)
    return Picture(f"view-{view}", command, answered("Write Fibonacci in Python."))


PICTURES = [
    Picture("first-screen", BUNDLED, greeted, rows=14),
    Picture("reply", BUNDLED, answered(QUESTION)),
    Picture("smollm2", (*BUNDLED, "--model", "smollm2"), answered(LIST)),
    viewed("heads"),
    viewed("markdown"),
    viewed("both"),
    Picture("thoughts", (*FAKE, "--reply", THINKING), answered("Capital of France?"), rows=16),
    Picture("race", BUNDLED, raced),
    Picture("chats", BUNDLED, listed),
    Picture("plain", (*BUNDLED, "--plain"), answered_plainly),
    Picture("narrow", BUNDLED, answered(QUESTION), columns=40),
    Picture("light", BUNDLED, answered(QUESTION), light=True),
]


def rows_of(screen: pyte.Screen) -> list[Text]:
    """Return the rows of a screen down to the last one with text."""
    rows = []
    for number in range(screen.lines):
        cells = [screen.buffer[number][column] for column in range(screen.columns)]
        row = Text()
        for style, run in groupby(cells, key=style_of):
            row.append("".join(cell.data for cell in run), style)
        row.rstrip()
        rows.append(row)
    while rows and not rows[-1].plain:
        rows.pop()
    return rows


def style_of(cell: Any) -> Style:
    return Style(
        color=colour(cell.fg),
        bold=cell.bold or None,
        dim=cell.blink or None,
        italic=cell.italics or None,
        underline=cell.underscore or None,
        strike=cell.strikethrough or None,
        reverse=cell.reverse or None,
    )


def colour(name: str) -> str | None:
    """Name a colour of pyte as rich does."""
    if name == "default":
        return None
    named = {"brown": "yellow"}.get(name, name)
    return (
        f"#{name}" if len(name) == 6 and all(char in "0123456789abcdef" for char in name) else named
    )


def taken(picture: Picture) -> list[Text]:
    """Open the chat, do what the picture shows, and return the screen."""
    with tempfile.TemporaryDirectory() as folder:
        command = picture.command
        if command[:2] == FAKE[:2]:
            command = (*command, "--history", f"{folder}/history")
        places = dict.fromkeys(("XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), folder)
        terminal = Terminal(
            *command, columns=picture.columns, rows=picture.rows, environment=places
        )
        terminal.screen = Screen(picture.columns, picture.rows, history=1000, ratio=0.5)
        terminal.screen.write_process_input = terminal.child.send
        terminal.stream = pyte.ByteStream(terminal.screen)
        try:
            picture.act(terminal)
            return rows_of(terminal.screen)
        finally:
            terminal.child.close(force=True)


def draw(rows: list[Text], picture: Picture, file: Path) -> None:
    """Write the rows of a screen as SVG."""
    console = Console(
        file=io.StringIO(),
        record=True,
        width=picture.columns,
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
    )
    for row in rows:
        console.print(row, soft_wrap=True, markup=False)
    theme = DEFAULT_TERMINAL_THEME if picture.light else SVG_EXPORT_THEME
    console.save_svg(str(file), title="medusa-chat", theme=theme, unique_id=picture.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("names", nargs="*", choices=[*(each.name for each in PICTURES), []])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        if not options.names or picture.name in options.names:
            draw(taken(picture), picture, options.out / f"{picture.name}.svg")
            print(options.out / f"{picture.name}.svg")


if __name__ == "__main__":
    main()
