"""The list of models, as `medusa-chat models` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.text import Text

from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.panel import UNKNOWN
from medusa_chat.terminal.theme import LABEL, NOTICE, STRONG, head_style
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SIZES = (2, 3)  # columns that are aligned to the right
NOTE = "memory: with heads and a full context; what fits depends on what is free now"


def show_models(listed: Sequence[Mapping[str, Any]]) -> None:
    """Print the models that --model knows (fields of Listed), each with its description."""
    names = ("model", "licence", "download", f"memory, {listed[0]['device']}", "fits")
    head = [Text(name, STRONG) for name in names]
    rows = [_row(model) for model in listed]
    columns = zip(head, *rows, strict=True)
    widths = [max(cell.cell_len for cell in column) for column in columns]
    console = SafeConsole(highlight=False)
    console.print(_aligned(head, widths))
    for model, row in zip(listed, rows, strict=True):
        console.print(_aligned(row, widths))
        console.print(Padding(Text(model["description"] or model["backbone"], LABEL), (0, 0, 0, 2)))
        if model["top1"]:
            console.print(_first_guesses(model["top1"]))
    console.print(Text(NOTE, LABEL))


def _row(model: Mapping[str, Any]) -> list[Text]:
    quant = "" if model["quant"] == "none" else f"{model['quant']} "
    memory = UNKNOWN if model["needs"] is None else quant + size_text(model["needs"])
    cells = (model["name"], model["licence"], _download(model["download"]), memory)
    return [*map(Text, cells), _fits(model)]


def _download(size: int | None) -> str:
    if size is None:
        return UNKNOWN
    return size_text(size) if size else "none"


def _fits(model: Mapping[str, Any]) -> Text:
    if model["short"] is None:
        return Text(UNKNOWN)
    if model["short"] == 0:
        return Text("yes")
    where = "" if model["short_of"] == model["device"] else f" on {model['short_of']}"
    return Text(f"{size_text(model['short'])} short{where}", NOTICE)


def _first_guesses(top1: Sequence[float]) -> Text:
    line = Text.assemble(("  first guesses of the heads that are right:", LABEL))
    for head, rate in enumerate(top1, 1):
        line.append(" ").append(f"{rate:.0%}", head_style(head))
    return line


def _aligned(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    """Join the cells of a row in columns."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        gap = " " * (width - cell.cell_len)
        parts = (gap, cell) if column in SIZES else (cell, gap)
        line = Text.assemble(line, *parts, "  ")
    line.rstrip()
    return line
