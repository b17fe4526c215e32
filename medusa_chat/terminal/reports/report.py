"""What the sub-commands besides chat print: progress on standard error, tables on standard output."""

from __future__ import annotations

import os
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from medusa_chat.stats import Stats
from medusa_chat.terminal.panel import UNKNOWN, panel
from medusa_chat.terminal.theme import ERROR, LABEL, NOTICE, STRONG, head_style
from medusa_chat.terminal.view import ReplyView
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from medusa_chat.config import Sampling
    from medusa_chat.events import Step

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
    console = Console(
        file=nowhere, force_terminal=True, color_system="truecolor", width=100, height=30
    )

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
    table = Table(
        "head", *(Column(f"{block} top-{rank}", justify="right") for rank, block in _BAR_BLOCKS), ""
    )
    cells = min(max(console.width - _BESIDE_BAR, 10), 50)
    for head, row in enumerate(top, 1):
        figures = (f"{100 * row[min(rank, len(row)) - 1]:.1f}%" for rank, _ in _BAR_BLOCKS)
        table.add_row(
            Text(f"■ {head} (+{head})", head_style(head)), *figures, _accuracy_bar(head, row, cells)
        )
    console.print(table)
    if checks:
        console.print(
            "acceptance length, forecast and measured on prompts held aside:", highlight=False
        )
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
    columns = (
        Column(name, justify="right") for name in ("nodes", "forecast", "measured", "difference")
    )
    table = Table("tree", *columns)
    for check in checks:
        difference = check["measured"] / check["forecast"] - 1
        measured = f"{check['measured']:.2f} ± {check['error']:.2f}"
        figures = (
            str(check["nodes"]),
            f"{check['forecast']:.2f}",
            measured,
            f"{100 * difference:+.1f}%",
        )
        table.add_row(check["tree"], *figures)
    return table


def show_models(listed: Sequence[Mapping[str, Any]]) -> None:
    """The models that --model knows by name (catalogue.Listed), each with a line that says what it is."""
    rows = [_model_row(model) for model in listed]
    device = listed[0]["device"]
    names = ("model", "licence", "download", f"memory, {device}", "fits")
    head = [Text(name, STRONG) for name in names]
    widths = [max(row[column].cell_len for row in (head, *rows)) for column in range(len(names))]
    console = Console(highlight=False)
    console.print(_aligned(head, widths))
    for model, row in zip(listed, rows, strict=True):
        console.print(_aligned(row, widths))
        console.print(Padding(Text(model["description"] or model["backbone"], LABEL), (0, 0, 0, 2)))
        if model["top1"]:
            rates = (
                Text(f"{rate:.0%}", head_style(head)) for head, rate in enumerate(model["top1"], 1)
            )
            console.print(
                Text.assemble(
                    ("  first guesses of the heads that are right: ", LABEL), Text(" ").join(rates)
                )
            )
    console.print(
        Text("memory: with heads and a full context; what fits depends on what is free now", LABEL)
    )


def _model_row(model: Mapping[str, Any]) -> list[Text]:
    if model["short"] is None:
        fits = Text(UNKNOWN)
    elif model["short"] == 0:
        fits = Text("yes")
    else:
        where = "" if model["short_of"] == model["device"] else f" on {model['short_of']}"
        fits = Text(f"{size_text(model['short'])} short{where}", NOTICE)
    quant = "" if model["quant"] == "none" else f"{model['quant']} "
    needs = UNKNOWN if model["needs"] is None else quant + size_text(model["needs"])
    download = {None: UNKNOWN, 0: "none"}.get(model["download"]) or size_text(model["download"])
    return [Text(model["name"]), Text(model["licence"]), Text(download), Text(needs), fits]


def _aligned(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    """Cells of a row in columns; sizes to the right."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        gap = " " * (width - cell.cell_len)
        line = (
            Text.assemble(line, gap, cell, "  ")
            if column in (2, 3)
            else Text.assemble(line, cell, gap, "  ")
        )
    line.rstrip()
    return line


def show_findings(findings: Sequence[Mapping[str, Any]]) -> None:
    """What doctor found (doctor.Finding), topic by topic; what is amiss is marked."""
    console = Console(highlight=False)
    width = max(cell_len(finding["name"]) for finding in findings)
    for topic, found in groupby(findings, key=itemgetter("topic")):
        console.print(Text(topic, STRONG))
        table = Table.grid(
            Column(width=1), Column(width=width), Column(overflow="fold"), padding=(0, 1)
        )
        for finding in found:
            mark = Text("✗", ERROR) if finding["fault"] else Text()
            table.add_row(
                mark,
                Text(finding["name"], LABEL),
                Text(finding["text"], ERROR if finding["fault"] else ""),
            )
        console.print(table)
