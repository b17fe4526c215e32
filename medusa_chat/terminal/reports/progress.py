"""A progress bar on standard error."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medusa_chat.terminal.output import SafeConsole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Draw a bar on standard error, if that is a terminal; yield a function of (done, total)."""
    console = SafeConsole(stderr=True)
    if not console.is_interactive:
        yield lambda *_: None  # rich would leave an empty line there, before any error
        return
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A refresh thread would take time from the measurements.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(text, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        yield show
