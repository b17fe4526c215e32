"""Results of `medusa-chat verify` as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from medusa_chat.terminal.output import SafeConsole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def show_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print the checks as a table, the first fault of each, and the verdict."""
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
    console.print(verdict(checks), highlight=False)


def verdict(checks: Sequence[Mapping[str, Any]]) -> str:
    """Say in one line what the checks found."""
    replies = sum(check["replies"] for check in checks)
    ties = sum(check["near_ties"] for check in checks)
    faulty = [check for check in checks if check["faults"]]
    if faulty:
        faults = sum(check["faults"] for check in faulty)
        return f"FAULT: {faults} of {replies} replies differ, in {len(faulty)} of the checks"
    equal = "all equal" if not ties else f"equal, but for {ties} near-ties"
    return f"verified: {replies} replies in {len(checks)} checks, {equal}"
