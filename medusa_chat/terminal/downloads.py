"""How far a download is: a bar on standard error, or a line for the chat's toolbar and spinner."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from medusa_chat.text import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTLING = 2.0  # seconds before a speed is told


class Download:
    """How far one repository is; its text is for a line that is drawn again and again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._began, self._first = time.monotonic(), 0
        self._there, self._total = 0, 0

    def update(self, there: int, total: int) -> None:
        """Bytes there and in all."""
        if not self._total:
            self._first = there  # from a download that was interrupted: no speed of this one
        self._there, self._total = there, total

    @property
    def done(self) -> bool:
        return self._there >= self._total

    def __str__(self) -> str:
        share = self._there / self._total if self._total else 1
        text = f"{self.name.split('/')[-1]} · {share:.0%} of {size_text(self._total)}"
        seconds = time.monotonic() - self._began
        speed = (self._there - self._first) / seconds if seconds > SETTLING else 0
        if speed < 1:
            return text
        return (
            f"{text} · {size_text(speed)}/s · {_duration((self._total - self._there) / speed)} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes}:{rest:02}"


@contextmanager
def downloads() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for one repository after the other on standard error, if that is a terminal; each goes when it is full."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda name, there, total: None
        return
    bars: dict[str, Progress] = {}

    def show(name: str, there: int, total: int) -> None:
        if name not in bars:
            whole = Column(no_wrap=True)
            columns = (
                BarColumn(),
                DownloadColumn(table_column=whole),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            bars[name] = Progress(
                TextColumn("{task.description}"), *columns, console=console, transient=True
            )
            bars[name].add_task(name.split("/")[-1], total=total, completed=there)
            bars[name].start()
        bar = bars[name]
        bar.update(bar.task_ids[0], completed=there, total=total)
        if bar.finished:
            bar.stop()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.stop()
