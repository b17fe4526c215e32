"""What the sub-commands besides chat print: progress on standard error, tables on standard output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from medusa_chat.config import ModelSpec, Sampling
from medusa_chat.events import Stats, Step
from medusa_chat.terminal.panel import panel
from medusa_chat.terminal.theme import head_style
from medusa_chat.terminal.view import ReplyView

_BAR_BLOCKS = ((1, "█"), (5, "▒"), (10, "░"))  # of an accuracy bar: up to which rank, drawn how
_BESIDE_BAR = 47  # cells of the table without the bar


@contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; call what is yielded with (done, total)."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda done, total: None  # rich would leave an empty line there, before any error
        return
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread: it would take time from what is being measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(text, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        yield show


def timed_view(sampling: Sampling) -> Callable[[Iterable[Step]], None]:
    """A consumer that draws a reply as chat does, on a terminal that nobody sees."""
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the consumer lives
    console = Console(file=nowhere, force_terminal=True, color_system="truecolor", width=100, height=30)

    def draw(steps: Iterable[Step]) -> None:
        stats = Stats()
        with ReplyView(console, lambda width: panel(stats, sampling, width)) as view:
            for step in steps:
                stats.add(step)
                view.add(step)

    return draw


def show_checks(checks: Sequence[dict[str, Any]]) -> None:
    """The result of verify as a table, and what the first fault of each check was."""
    table = Table("check", "replies", "equal", "near-ties", "faults", "largest gap")
    for check in checks:
        style = "bold red" if check["faults"] else ""
        numbers = (str(check[key]) for key in ("replies", "equal", "near_ties", "faults"))
        table.add_row(check["name"], *numbers, f"{check['largest_gap']:.2g}", style=style)
    console = Console()
    console.print(table)
    for check in checks:
        if check["first_fault"]:
            console.print(f"{check['name']}: {check['first_fault']}", markup=False)


def show_accuracy(top: Sequence[Sequence[float]], checks: Sequence[dict[str, Any]]) -> None:
    """Top-i accuracy of each head as figures and a bar, and the check of the forecast if there was one."""
    console = Console()
    table = Table("head", *(Column(f"{block} top-{rank}", justify="right") for rank, block in _BAR_BLOCKS), "")
    cells = min(max(console.width - _BESIDE_BAR, 10), 50)
    for head, row in enumerate(top, 1):
        figures = (f"{100 * row[min(rank, len(row)) - 1]:.1f}%" for rank, _ in _BAR_BLOCKS)
        table.add_row(Text(f"■ {head} (+{head})", head_style(head)), *figures, _accuracy_bar(head, row, cells))
    console.print(table)
    if checks:
        console.print("acceptance length, forecast and measured on prompts held aside:", highlight=False)
        console.print(_check_table(checks))


def _accuracy_bar(head: int, row: Sequence[float], whole: int) -> Text:
    """Top-1 solid; what the guesses behind it add is lighter, and of another shape for screens without colour."""
    bar, length = Text(style=head_style(head)), 0
    for rank, block in _BAR_BLOCKS:
        cells = round(whole * row[min(rank, len(row)) - 1])
        bar.append(block * (cells - length))
        length = cells
    return bar


def _check_table(checks: Sequence[dict[str, Any]]) -> Table:
    columns = (Column(name, justify="right") for name in ("nodes", "forecast", "measured", "difference"))
    table = Table(*columns)
    for check in checks:
        difference = check["measured"] / check["forecast"] - 1
        measured = f"{check['measured']:.2f} ± {check['error']:.2f}"
        table.add_row(str(check["nodes"]), f"{check['forecast']:.2f}", measured, f"{100 * difference:+.1f}%")
    return table


def show_models(specs: Sequence[ModelSpec], top1: Mapping[str, Sequence[float]]) -> None:
    """The models that --model knows by name; top1: of each measured model the top-1 accuracy of its heads."""
    table = Table("model", "backbone", "licence", "heads, top-1", "description")
    for spec in specs:
        rates = (Text(f"{rate:.0%}", head_style(head)) for head, rate in enumerate(top1.get(spec.name, ()), 1))
        table.add_row(spec.name, spec.backbone, spec.licence, Text(" ").join(rates) or Text("–"), spec.description)
    Console().print(table)
