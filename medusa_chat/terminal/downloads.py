"""Progress of a download: a bar on standard error, or a line for the chat's toolbar and spinner."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from medusa_chat.terminal.output import SafeConsole
from medusa_chat.text import duration_text, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

SETTLING = 2.0  # seconds before a speed is shown


class Download:
    """Progress of one repository; its text is for a line that is redrawn again and again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._began = time.monotonic()
        self._first = 0
        self._received = 0
        self._total = 0

    def update(self, received: int, total: int) -> None:
        """Set the bytes received so far and in all."""
        if not self._total:
            self._first = received  # by an earlier run: no part of this run's speed
        self._received = received
        self._total = total

    @property
    def done(self) -> bool:
        """True once all bytes are here."""
        return self._received >= self._total

    def __str__(self) -> str:
        share = self._received / self._total if self._total else 1
        text = f"{_short(self.name)} · {share:.0%} of {size_text(self._total)}"
        seconds = time.monotonic() - self._began
        speed = (self._received - self._first) / seconds if seconds > SETTLING else 0
        if speed < 1:
            return text
        left = duration_text((self._total - self._received) / speed)
        return f"{text} · {size_text(speed)}/s · {left} left"


@contextmanager
def downloads() -> Iterator[Callable[[str, int, int], None]]:
    """Draw a bar for each repository in turn on standard error, if that is a terminal.

    Yields a function to call with (repository, bytes received, bytes in all).
    """
    console = SafeConsole(stderr=True)
    if not console.is_interactive:
        yield lambda *_: None
        return
    bars: dict[str, Progress] = {}

    def show(name: str, received: int, total: int) -> None:
        if name not in bars:
            bars[name] = _start_bar(console, name, received, total)
        bar = bars[name]
        bar.update(bar.task_ids[0], completed=received, total=total)
        if bar.finished:
            bar.stop()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.stop()


def _start_bar(console: Console, name: str, received: int, total: int) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task(_short(name), total=total, completed=received)
    bar.start()
    return bar


def _short(name: str) -> str:
    return name.split("/")[-1]
