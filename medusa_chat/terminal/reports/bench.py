"""What `medusa-chat bench` prints on standard output before its line of JSON: tables, none wider than 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from medusa_chat.config import UserError
from medusa_chat.terminal.panel import UNKNOWN
from medusa_chat.terminal.theme import NOTICE, head_name

if TYPE_CHECKING:
    from pathlib import Path

Figures = Mapping[str, Any]

_ROWS = (
    ("acceptance_length", "acceptance length", "{:.2f} tokens/step"),
    ("overhead", "overhead", "{:.2f} vanilla steps"),
    ("speedup", "speedup over vanilla", "{:.2f}x"),
    ("throughput_ratio", "tokens/s over vanilla", "{:.2f}x"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("vanilla_tokens_per_second", "tokens/s, vanilla", "{:.1f}"),
    ("wall_tokens_per_second", "tokens/s, prefill included", "{:.1f}"),
    ("step_ms", "step", "{:.2f} ms"),
    ("vanilla_step_ms", "step, vanilla", "{:.2f} ms"),
    ("time_to_first_token_ms", "time to first token", "{:.1f} ms"),
)
_CATEGORY_COLUMNS = (
    ("acceptance_length", "length", "{:.2f}"),
    ("overhead", "overhead", "{:.2f}"),
    ("speedup", "speedup", "{:.2f}x"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("time_to_first_token_ms", "first token", "{:.1f} ms"),
)


def check_file(file: Path | None) -> None:
    """Raise UserError if the file could not be written in the end: to be called before the long work."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"--json {file}: it is a folder, or there is no folder {file.parent}")


def show_bench(result: Figures, console: Console | None = None) -> None:
    """The result of medusa_chat.bench.command.measure as tables."""
    console = console or Console()
    if result["modes"]:
        console.print(_modes_table(result))
        for mode, figures in result["modes"].items():
            if len(figures["categories"]) > 1:
                console.print(_categories_table(mode, figures))
                console.print()
        if result["turns"] > 1:
            console.print(_turns_table(result["modes"]))
        _show_machine(console, result)
    for name, shape in result.get("shapes", {}).items():
        kind = "LM heads of their own" if shape["own"] else "a shared LM head"
        text = f"{name}, random weights, {shape['heads']} heads with {kind}; {result['device']}, {shape['dtype']}"
        console.print()
        console.print(Text(text, "bold"))
        _show_machine(console, shape)
    for name, why in result.get("left_out_shapes", {}).items():
        console.print(Text(f"{name} was left out: {why}", NOTICE))
    if "float32" in result:
        checks = result["float32"]
        console.print()
        console.print(Text(f"bundled model in float32, tree {checks['tree']}", "bold"))
        same = {mode: _same(check) for mode, check in checks["cpu"].items()}
        console.print(_captured_table(checks["eager"], "as on the CPU", same))


def _captured_table(checks: Figures, extra: str, cells: Mapping[str, str | Text]) -> Table:
    """Captured steps against eager ones, mode by mode, and one column more."""
    names = ("as eager ones", "tokens/s", "eager", extra)
    table = Table("captured steps", *(Column(name, justify="right") for name in names))
    for mode, check in checks.items():
        rates = (f"{check[key]:.1f}" for key in ("tokens_per_second", "eager_tokens_per_second"))
        table.add_row(mode, _same(check), *rates, cells.get(mode, UNKNOWN))
    return table


def _same(check: Figures) -> Text:
    """How many replies are the same, and of how many; if not all, the share of tokens before the first difference."""
    text = f"{check['equal']} of {check['replies']}"
    return (
        Text(text)
        if check["equal"] == check["replies"]
        else Text(f"{text}, {check['agreed']:.0%}", NOTICE)
    )


def _modes_table(result: Figures) -> Table:
    modes = result["modes"]
    title = f"{result['model']} on {result['device']}, {result['dtype']}; {result['prompts']} prompts x {result['rounds']}"
    table = Table("", *modes, title=title, caption=f"tree {result['tree']}")
    for key, name, form in _ROWS:
        table.add_row(name, *(_form(form, mode.get(key)) for mode in modes.values()))
    heads = sorted({head for mode in modes.values() for head in mode["head_acceptance"]}, key=int)
    for head in heads:
        rates = (mode["head_acceptance"].get(head) for mode in modes.values())
        table.add_row(
            f"{head_name(int(head))}, accepted when tested",
            *(_form("{:.0%}", rate) for rate in rates),
        )
    for name, peer in result["peers"].items():
        table.add_section()
        table.add_row(f"{name}, tokens/s", f"{peer['tokens_per_second']:.1f}")
        table.add_row(
            "times that, prefill included", *(f"{peer['ratio'][mode]:.2f}x" for mode in modes)
        )
        table.add_row("our vanilla, times that", f"{peer['vanilla_ratio']:.2f}x")
    table.add_section()
    if "view" in result:
        table.add_row(
            "tokens/s kept with the live view",
            f"{result['view']['share_of_tokens_per_second']:.1%}",
        )
    table.add_row("time to load", f"{result['load_seconds']:.1f} s")
    if result["left_out"]:
        table.add_row("prompts too long for the context", str(result["left_out"]))
    return table


def _categories_table(mode: str, figures: Figures) -> Table:
    """One mode's figures by category, over all in the last row."""
    columns = [Column(name, justify="right", no_wrap=True) for _, name, _ in _CATEGORY_COLUMNS]
    heads = Column("heads, %", justify="right", no_wrap=True)
    table = Table(mode, *columns, heads, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for category, row in [*figures["categories"].items(), ("all", figures)]:
        cells = (_form(form, row[key]) for key, _, form in _CATEGORY_COLUMNS)
        rates = " ".join(
            f"{100 * rate:.0f}" for _, rate in sorted(row["head_acceptance"].items(), key=_by_head)
        )
        name = Text(f"{category} ({row['prompts']})", overflow="ellipsis", no_wrap=True)
        table.add_row(name, *cells, rates or UNKNOWN, style="bold" if category == "all" else "")
    return table


def _by_head(entry: tuple[str, float]) -> int:
    return int(entry[0])


def _turns_table(modes: Figures) -> Table:
    table = Table(
        "turn",
        Column("conversations", justify="right"),
        title="time to first token, and tokens prefilled",
    )
    for mode in modes:
        table.add_column(mode, justify="right")
    rows = zip(*(mode["turns"] for mode in modes.values()), strict=False)
    for number, turns in enumerate(rows, 1):
        cells = (
            f"{turn['time_to_first_token_ms']:.1f} ms, {turn['prefilled_tokens']}" for turn in turns
        )
        table.add_row(str(number), str(turns[0]["conversations"]), *cells)
    return table


def _show_machine(console: Console, figures: Figures) -> None:
    """What was measured of one model besides replies."""
    if figures["steps"]:
        console.print(_steps_table(figures["steps"]))
        console.print(_limit_text(figures))
    if figures["parts"]:
        console.print(_parts_table(figures["parts"]))
    if "history" in figures:
        console.print(_history_table(figures["history"]))
    if "apart" in figures:
        console.print(_apart_table(figures["steps"], figures["apart"]))
    if "eager" in figures:
        waits = {
            mode: f"{host['median_ms']:.3f} ms" for mode, host in figures.get("host", {}).items()
        }
        console.print(_captured_table(figures["eager"], "wait for the host", waits))
    for notice in figures.get("notices", ()):
        console.print(Text(notice, NOTICE))
    peaks = ", ".join(
        f"{size / 2**30:.2f} GiB on the {place}"
        for place, size in figures["peak_memory_bytes"].items()
    )
    note = ", with the other decoder's own copy of the weights" if figures.get("peers") else ""
    console.print(f"peak memory: {peaks or UNKNOWN}{note}", highlight=False)


def _steps_table(steps: Sequence[Figures]) -> Table:
    """Cost of a step by nodes, one column for each number of cached positions; below, the tree that `auto` picks."""
    simulated = any(step["tree"]["simulated"] for step in steps)
    table = Table(
        "step behind so many positions",
        *(Column(str(s["context"]), justify="right") for s in steps),
    )
    table.add_row("vanilla", *(f"{step['vanilla_ms']:.2f} ms" for step in steps))
    for nodes in steps[0]["nodes"]:
        costs = (step["nodes"][nodes] for step in steps)
        table.add_row(
            f"{nodes} nodes", *(f"{cost['ms']:.2f} ms, {cost['overhead']:.2f}x" for cost in costs)
        )
    table.add_section()
    table.add_row(
        "tree that auto picks", *(f"{s['tree']['kind']}, {s['tree']['nodes']} nodes" for s in steps)
    )
    how = "SIMULATED" if simulated else "forecast"
    table.add_row(
        f"acceptance length, {how}", *(f"{step['tree']['acceptance_length']:.2f}" for step in steps)
    )
    projected = "projected, SIMULATED" if simulated else how
    table.add_row(f"speedup, {projected}", *(f"{step['tree']['speedup']:.2f}x" for step in steps))
    table.add_row(
        f"tokens/s, {projected}", *(f"{step['tree']['tokens_per_second']:.1f}" for step in steps)
    )
    table.add_section()
    for kind, name in (("vanilla", "vanilla reads"), ("tree", "that tree's step reads")):
        bands = [step["bandwidth"][kind] for step in steps]
        table.add_row(
            name, *(f"{_size(b['bytes'])} at {b['gb_per_second']:.1f} GB/s" for b in bands)
        )
        table.add_row("  of the limit", *(f"{b['share_of_limit']:.0%}" for b in bands))
    if simulated:
        table.caption = f"simulated from {steps[0]['tree']['simulated']}"
    return table


def _apart_table(steps: Sequence[Figures], apart: Sequence[Figures]) -> Table:
    """What joined matrices bring: cost of a step with them, and without them."""
    table = Table(
        "matrices joined, and apart", *(Column(str(s["context"]), justify="right") for s in steps)
    )
    pairs = list(zip(steps, apart, strict=True))
    table.add_row("vanilla", *(_pair(a["vanilla_ms"], b["vanilla_ms"]) for a, b in pairs))
    for nodes in steps[0]["nodes"]:
        table.add_row(
            f"{nodes} nodes",
            *(_pair(a["nodes"][nodes]["ms"], b["nodes"][nodes]["ms"]) for a, b in pairs),
        )
    return table


def _pair(joined: float, apart: float) -> str:
    return f"{joined:.2f}, {apart:.2f} ms: {apart / joined:.2f}x"


def _limit_text(figures: Figures) -> Text:
    """What the shares are of."""
    limit = figures["limit"]
    text = (
        f"limit: {limit['memory_gb_per_second']:.1f} GB/s, a read of {_size(limit['buffer_bytes'])}"
    )
    if limit["in_cache"]:
        size, cache = (_size(size) for size in (figures["backbone_bytes"], limit["cache_bytes"]))
        text = (
            f"limit: {limit['cached_gb_per_second']:.1f} GB/s, a read of {size}, as the model fits into the cache of"
            f" {cache}; memory itself: {limit['memory_gb_per_second']:.1f} GB/s"
        )
    return Text(text)


def _parts_table(parts: Mapping[str, Figures]) -> Table:
    table = Table("part of a step", *(Column(mode, justify="right") for mode in parts))
    for part in next(iter(parts.values()))["ms"]:
        cells = (
            f"{mode['ms'][part]:.2f} ms {mode['shares'][part]:4.0%}" for mode in parts.values()
        )
        table.add_row(part, *cells)
    table.add_section()
    table.add_row(
        "outside the forward", *(f"{mode['outside_forward']:.0%}" for mode in parts.values())
    )
    return table


def _history_table(rows: Iterable[Figures]) -> Table:
    rows = list(rows)
    names = ("history", "prefilled", "cache kept", "prefilled anew")
    title = f"time to first token of a second turn of {rows[0]['new_tokens']} tokens"
    table = Table(*(Column(name, justify="right") for name in names), title=title)
    for row in rows:
        times = (f"{row[key]:.1f} ms" for key in ("kept_ms", "anew_ms"))
        table.add_row(str(row["history"]), str(row["prefilled"]), *times)
    return table


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _form(form: str, value: float | None) -> str:
    return UNKNOWN if value is None else form.format(value)
