"""A chat in a real pseudo-terminal, typed to as a user types; its screen is what tests assert on."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pexpect
import pyte

from tests.helpers.fake_engine import coloured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.events import Step

ROOT = Path(__file__).parent.parent.parent
ENTER, NEW_LINE, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"
PATIENCE = 60


class Chat:
    """A chat that `command` (words behind python) starts in a pseudo-terminal."""

    def __init__(
        self, *command: str, columns: int = 80, rows: int = 30, **environment: str
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        clean = {
            key: value
            for key, value in os.environ.items()
            if key not in ("NO_COLOR", "COLUMNS", "LINES")
        }
        settings = {
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        self.child = pexpect.spawn(
            sys.executable,
            list(command),
            dimensions=(rows, columns),
            env=clean | settings,
            timeout=PATIENCE,
        )
        # a real terminal answers when it is asked for the cursor's position
        self.screen.write_process_input = self.child.send  # type: ignore[method-assign]

    @property
    def text(self) -> str:
        kept = [
            *self.screen.history.top,
            *(self.screen.buffer[row] for row in range(self.screen.lines)),
        ]
        lines = (
            "".join(row[column].data for column in range(self.screen.columns)).rstrip()
            for row in kept
        )
        return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")

    def see(self, wanted: str | Callable[[str], bool]) -> str:
        """Wait until the text is on the screen; returns all that is."""
        until = time.monotonic() + PATIENCE
        while not (wanted in self.text if isinstance(wanted, str) else wanted(self.text)):
            if time.monotonic() > until:
                raise AssertionError(f"not seen: {wanted}\n{self.text}")
            self.read()
        return self.text

    def read(self) -> None:
        with suppress(pexpect.TIMEOUT):
            self.stream.feed(self.child.read_nonblocking(4096, timeout=0.05))

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def say(self, line: str) -> None:
        """Type a line, see it on the screen, send it."""
        self.send(line)
        self.see(f"› {line.splitlines()[0]}")
        self.send(ENTER)

    def replies(self, count: int) -> str:
        """Wait until `count` replies have ended and the prompt is back."""
        return self.see(lambda text: text.count("acceptance length") == count and self.at_prompt)

    @property
    def at_prompt(self) -> bool:
        return (
            not self.screen.cursor.hidden
            and self.screen.buffer[self.screen.cursor.y][0].data == "›"
        )

    def status(self) -> int | None:
        """Wait for the end; the exit status."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                self.read()
            except pexpect.EOF:
                break
        self.child.close()
        return self.child.exitstatus


def assert_colours(terminal: Chat, row: int, steps: Iterable[Step]) -> None:
    """Every character of the reply that begins in `row` has the colour of the head that its step names."""
    expected = coloured(steps)
    lines = range(row, terminal.screen.lines)
    cells = [
        terminal.screen.buffer[line][column]
        for line in lines
        for column in range(terminal.screen.columns)
    ]
    shown = [(cell.data, cell.fg) for cell in cells if cell.data != " "]
    assert shown[: len(expected)] == expected
    assert len({colour for _, colour in expected}) > 2
