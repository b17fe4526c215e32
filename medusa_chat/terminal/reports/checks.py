"""Results of `medusa-chat verify` as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from medusa_chat.terminal.output import SafeConsole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def show_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print the checks as a table, and the first fault of each."""
    table = Table("check", "replies", "equal", "near-ties", "faults", "largest gap")
    for check in checks:
        counts = (str(check[key]) for key in ("replies", "equal", "near_ties", "faults"))
        style = "bold red" if check["faults"] else ""
        table.add_row(check["name"], *counts, f"{check['largest_gap']:.2g}", style=style)
    console = SafeConsole()
    console.print(table)
    for check in checks:
        if check["first_fault"]:
            console.print(f"{check['name']}: {check['first_fault']}", markup=False)
