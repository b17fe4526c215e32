"""Tables of `medusa-chat bench` on the steps of one model: cost, bandwidth, parts and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from medusa_chat.terminal.panel import UNKNOWN
from medusa_chat.terminal.theme import NOTICE
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from rich.console import Console

Figures = Mapping[str, Any]


def show_steps(console: Console, figures: Figures) -> None:
    """Print the figures of one model's steps, the notices and the peak memory."""
    for table in _tables(figures):
        console.print(table)
    for notice in figures.get("notices", ()):
        console.print(Text(notice, NOTICE))
    console.print(_peak_memory(figures), highlight=False)


def captured_table(checks: Figures, extra: str, cells: Mapping[str, str | Text]) -> Table:
    """Compare captured steps with eager ones by mode, with one more column."""
    names = ("as eager ones", "tokens/s", "eager", extra)
    table = Table("captured steps", *_right(names))
    for mode, check in checks.items():
        captured = f"{check['tokens_per_second']:.1f}"
        eager = f"{check['eager_tokens_per_second']:.1f}"
        table.add_row(mode, same_text(check), captured, eager, cells.get(mode, UNKNOWN))
    return table


def same_text(check: Figures) -> Text:
    """Count equal replies; if some differ, add the share of tokens before the difference."""
    text = f"{check['equal']} of {check['replies']}"
    if check["equal"] == check["replies"]:
        return Text(text)
    return Text(f"{text}, {check['agreed']:.0%}", NOTICE)


def _tables(figures: Figures) -> Iterator[Table | Text]:
    if figures["steps"]:
        yield _cost_table(figures["steps"])
        yield _limit_text(figures)
    if figures["parts"]:
        yield _parts_table(figures["parts"])
    if "history" in figures:
        yield _history_table(figures["history"])
    if "apart" in figures:
        yield _apart_table(figures["steps"], figures["apart"])
    if "eager" in figures:
        hosts = figures.get("host", {})
        waits = {mode: f"{host['median_ms']:.3f} ms" for mode, host in hosts.items()}
        yield captured_table(figures["eager"], "wait for the host", waits)


def _peak_memory(figures: Figures) -> str:
    peaks = figures["peak_memory_bytes"].items()
    sizes = ", ".join(f"{size / 2**30:.2f} GiB on the {place}" for place, size in peaks)
    note = ", with the other decoder's own copy of the weights" if figures.get("peers") else ""
    return f"peak memory: {sizes or UNKNOWN}{note}"


def _right(names: Iterable[Any]) -> Iterator[Column]:
    return (Column(str(name), justify="right") for name in names)


def _cells(form: str, columns: Iterable[Figures]) -> Iterator[str]:
    """Format the cells of a row, each from its column's figures by name."""
    return (form.format_map(figures) for figures in columns)


def _cost_table(steps: Sequence[Figures]) -> Table:
    """Draw the cost of a step by nodes, with a column for each number of cached positions."""
    table = Table("cached positions", *_right(step["context"] for step in steps))
    table.add_row("vanilla", *_cells("{vanilla_ms:.2f} ms", steps))
    for nodes in steps[0]["nodes"]:
        costs = (step["nodes"][nodes] for step in steps)
        table.add_row(f"{nodes} nodes", *_cells("{ms:.2f} ms, {overhead:.2f}x", costs))
    table.add_section()
    _add_tree_rows(table, [step["tree"] for step in steps])
    table.add_section()
    _add_bandwidth_rows(table, "vanilla reads", [step["bandwidth"]["vanilla"] for step in steps])
    bands = [step["bandwidth"]["tree"] for step in steps]
    _add_bandwidth_rows(table, "that tree's step reads", bands)
    return table


def _add_tree_rows(table: Table, trees: Sequence[Figures]) -> None:
    """Add the trees that `auto` picks, and what they should bring."""
    simulated = next((tree["simulated"] for tree in trees if tree["simulated"]), None)
    how = "SIMULATED" if simulated else "forecast"
    projected = "projected, SIMULATED" if simulated else "forecast"
    table.add_row("tree that auto picks", *_cells("{kind}, {nodes} nodes", trees))
    table.add_row(f"acceptance length, {how}", *_cells("{acceptance_length:.2f}", trees))
    table.add_row(f"speedup, {projected}", *_cells("{speedup:.2f}x", trees))
    table.add_row(f"tokens/s, {projected}", *_cells("{tokens_per_second:.1f}", trees))
    if simulated:
        table.caption = f"simulated from {simulated}"


def _add_bandwidth_rows(table: Table, name: str, bands: Sequence[Figures]) -> None:
    sizes = (size_text(band["bytes"]) for band in bands)
    speeds = _cells("{gb_per_second:.1f} GB/s", bands)
    reads = (f"{size} at {speed}" for size, speed in zip(sizes, speeds, strict=True))
    table.add_row(name, *reads)
    table.add_row("  of the limit", *_cells("{share_of_limit:.0%}", bands))


def _limit_text(figures: Figures) -> Text:
    """Name the bandwidth that the shares refer to."""
    limit = figures["limit"]
    memory = f"{limit['memory_gb_per_second']:.1f} GB/s"
    if not limit["in_cache"]:
        return Text(f"limit: {memory}, a read of {size_text(limit['buffer_bytes'])}")
    size = size_text(figures["backbone_bytes"])
    cache = size_text(limit["cache_bytes"])
    return Text(
        f"limit: {limit['cached_gb_per_second']:.1f} GB/s, a read of {size}, because the model fits"
        f" into the cache of {cache}; memory itself: {memory}"
    )


def _parts_table(parts: Mapping[str, Figures]) -> Table:
    table = Table("part of a step", *_right(parts))
    modes = list(parts.values())
    for part in modes[0]["ms"]:
        cells = (f"{mode['ms'][part]:.2f} ms {mode['shares'][part]:4.0%}" for mode in modes)
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("outside the forward", *_cells("{outside_forward:.0%}", modes))
    return table


def _history_table(rows: Sequence[Figures]) -> Table:
    names = ("history", "prefilled", "cache kept", "prefilled anew")
    title = f"time to first token of a second turn of {rows[0]['new_tokens']} tokens"
    table = Table(*_right(names), title=title)
    for row in rows:
        times = (f"{row[key]:.1f} ms" for key in ("kept_ms", "anew_ms"))
        table.add_row(str(row["history"]), str(row["prefilled"]), *times)
    return table


def _apart_table(joined: Sequence[Figures], apart: Sequence[Figures]) -> Table:
    """Compare the cost of a step with joined matrices and with separate ones."""
    table = Table("matrices joined, and apart", *_right(step["context"] for step in joined))
    pairs = list(zip(joined, apart, strict=True))
    table.add_row("vanilla", *(_gain(a["vanilla_ms"], b["vanilla_ms"]) for a, b in pairs))
    for nodes in joined[0]["nodes"]:
        costs = ((a["nodes"][nodes]["ms"], b["nodes"][nodes]["ms"]) for a, b in pairs)
        table.add_row(f"{nodes} nodes", *(_gain(*pair) for pair in costs))
    return table


def _gain(joined: float, apart: float) -> str:
    return f"{joined:.2f}, {apart:.2f} ms: {apart / joined:.2f}x"
