"""Findings of `medusa-chat doctor`, by topic."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text

from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.theme import ERROR, LABEL, STRONG

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def show_findings(findings: Sequence[Mapping[str, Any]]) -> None:
    """Print the findings (fields of doctor.Finding) by topic; mark the faults."""
    console = SafeConsole(highlight=False)
    width = max(cell_len(finding["name"]) for finding in findings)
    for topic, found in groupby(findings, key=itemgetter("topic")):
        columns = (Column(width=1), Column(width=width), Column(overflow="fold"))
        table = Table.grid(*columns, padding=(0, 1))
        for finding in found:
            fault = finding["fault"]
            mark = Text("✗", ERROR) if fault else Text()
            text = Text(finding["text"], ERROR if fault else "")
            table.add_row(mark, Text(finding["name"], LABEL), text)
        console.print(Text(topic, STRONG))
        console.print(table)
