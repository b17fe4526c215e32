"""Accuracy of the heads, as `medusa-chat calibrate` measured it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.theme import head_style

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Rows = Sequence[Sequence[float]]

RANKS = ((1, "█"), (5, "▒"), (10, "░"))  # up to which rank a part of the bar counts
OTHER_COLUMNS = 47  # cells of the table without the bar


def show_accuracy(top: Rows, exact: Rows, checks: Sequence[Mapping[str, Any]]) -> None:
    """Print each head's top-i accuracy as figures and a bar, and the check of the forecast.

    Args:
        top: as `charts.plot` has it.
        exact: the same in exact mode; empty if it was not measured.
        checks: as `charts.plot` has them, each with a forecast too.
    """
    console = SafeConsole()
    console.print(_table(top, console.width))
    if exact:
        console.print("exact mode, guesses ranked with the noise of the draws:", highlight=False)
        console.print(_table(exact, console.width))
    if checks:
        title = "acceptance length, forecast and measured on prompts set aside:"
        console.print(title, highlight=False)
        console.print(_check_table(checks))


def _table(top: Rows, screen: int) -> Table:
    columns = (Column(f"{block} top-{rank}", justify="right") for rank, block in RANKS)
    table = Table("head", *columns, "")
    width = min(max(screen - OTHER_COLUMNS, 10), 50)
    for head, row in enumerate(top, 1):
        name = Text(f"■ {head} (+{head})", head_style(head))
        figures = (f"{100 * _at_rank(row, rank):.1f}%" for rank, _ in RANKS)
        table.add_row(name, *figures, _bar(head, row, width))
    return table


def _at_rank(row: Sequence[float], rank: int) -> float:
    return row[min(rank, len(row)) - 1]


def _bar(head: int, row: Sequence[float], width: int) -> Text:
    """Draw top-1 solid and later ranks lighter, in another shape for screens without colour."""
    bar = Text(style=head_style(head))
    for rank, block in RANKS:
        cells = round(width * _at_rank(row, rank))
        bar.append(block * (cells - len(bar)))
    return bar


def _check_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    names = ("nodes", "forecast", "measured", "difference")
    table = Table("tree", *(Column(name, justify="right") for name in names))
    for check in checks:
        difference = check["measured"] / check["forecast"] - 1
        table.add_row(
            check["tree"],
            str(check["nodes"]),
            f"{check['forecast']:.2f}",
            f"{check['measured']:.2f} ± {check['error']:.2f}",
            f"{100 * difference:+.1f}%",
        )
    return table
