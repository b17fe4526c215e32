"""A chat in a real pseudo-terminal, for tests that type as a user does and read the screen."""

from __future__ import annotations

import os
import sys
import termios
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pexpect
import pyte

from tests.helpers.fake_engine import coloured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from medusa_chat.events import Step

ROOT = Path(__file__).parent.parent.parent
ENTER, NEW_LINE, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"
ALT_V, BACKSPACE = "\x1bv", "\x7f"
PATIENCE = 60


class Terminal:
    """A pseudo-terminal in which python runs `command`."""

    def __init__(
        self,
        *command: str,
        columns: int = 80,
        rows: int = 30,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = ""  # all that was written
        self.settings: list[Any] = []  # of the terminal at the program's end
        variables = dict(os.environ)
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            variables.pop(name, None)
        variables |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONPATH": str(ROOT)}
        self.child = pexpect.spawn(
            sys.executable,
            list(command),
            dimensions=(rows, columns),
            env=variables | dict(environment or {}),
            timeout=PATIENCE,
        )
        # a real terminal answers when it is asked for the cursor's position
        self.screen.write_process_input = self.child.send  # type: ignore[method-assign]

    @property
    def text(self) -> str:
        """Scrollback and screen."""
        rows = [*self.screen.history.top]
        rows += [self.screen.buffer[row] for row in range(self.screen.lines)]
        columns = range(self.screen.columns)
        lines = ("".join(row[column].data for column in columns).rstrip() for row in rows)
        return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")

    def see(self, wanted: str | Callable[[str], bool]) -> str:
        """Wait until the text is on the screen; return all of the screen."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            text = self.text
            if wanted in text if isinstance(wanted, str) else wanted(text):
                return text
            self.read()
        raise AssertionError(f"not seen: {wanted}\n{self.text}")

    def read(self) -> None:
        with suppress(pexpect.TIMEOUT):
            written = self.child.read_nonblocking(4096, timeout=0.05)
            self.raw += written.decode(errors="replace")
            self.stream.feed(written)

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def say(self, line: str) -> None:
        """Type a line, see it on the screen, press Enter.

        The first one waits for the prompt: until then the terminal itself may echo what is typed.
        """
        if not self.raw:
            self.see(lambda _: self.at_prompt)
        self.send(line)
        self.see(f"› {line.splitlines()[0]}"[: self.screen.columns // 2])  # a long one wraps
        self.send(ENTER)

    def replies(self, count: int) -> str:
        """Wait until `count` replies have ended and the prompt is back."""
        return self.see(lambda text: text.count("tokens per step") == count and self.at_prompt)

    @property
    def at_prompt(self) -> bool:
        return (
            not self.screen.cursor.hidden
            and self.screen.buffer[self.screen.cursor.y][0].data == "›"
        )

    def status(self) -> int | None:
        """Wait for the end; return the exit status."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                self.read()
            except pexpect.EOF:
                break
        self.settings = termios.tcgetattr(self.child.child_fd)
        self.child.close()
        status: int | None = self.child.exitstatus
        return status


def assert_colours(terminal: Terminal, row: int, steps: Iterable[Step]) -> None:
    """Each character of the reply that begins in `row` has the colour of its head."""
    expected = coloured(steps)
    screen = terminal.screen
    cells = product(range(row, screen.lines), range(screen.columns))
    characters = (screen.buffer[line][column] for line, column in cells)
    shown = [(each.data, each.fg) for each in characters if each.data != " "]
    assert shown[: len(expected)] == expected
    assert len({colour for _, colour in expected}) > 2
