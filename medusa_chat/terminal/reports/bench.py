"""Tables of `medusa-chat bench`, at most 80 columns wide: replies by mode, category and turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from medusa_chat.config import UserError
from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.panel import UNKNOWN
from medusa_chat.terminal.reports.bench_steps import captured_table, same_text, show_steps
from medusa_chat.terminal.theme import NOTICE, head_name

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

Figures = Mapping[str, Any]

# key in the result, name, format
RATE_ROWS = (
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("vanilla_tokens_per_second", "tokens/s, vanilla", "{:.1f}"),
    ("wall_tokens_per_second", "tokens/s, prefill included", "{:.1f}"),
)
MODE_ROWS = (
    ("acceptance_length", "acceptance length", "{:.2f} tokens/step"),
    ("overhead", "overhead", "{:.2f} vanilla steps"),
    ("speedup", "speedup over vanilla", "{:.2f}x"),
    ("throughput_ratio", "tokens/s over vanilla", "{:.2f}x"),
    ("step_ms", "step", "{:.2f} ms"),
    ("vanilla_step_ms", "step, vanilla", "{:.2f} ms"),
    ("time_to_first_token_ms", "time to first token", "{:.1f} ms"),
)
CATEGORY_COLUMNS = (
    ("acceptance_length", "length", "{:.2f}"),
    ("overhead", "overhead", "{:.2f}"),
    ("speedup", "speedup", "{:.2f}x"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("time_to_first_token_ms", "first token", "{:.1f} ms"),
)


def check_file(file: Path | None) -> None:
    """Raise UserError if the file cannot be written; call it before the long work."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"--json {file}: it is a folder, or there is no folder {file.parent}")


def show_bench(result: Figures, console: Console | None = None) -> None:
    """Print the result of medusa_chat.bench.command.measure as tables."""
    console = console or SafeConsole()
    if result["modes"]:
        _show_replies(console, result)
        show_steps(console, result)
    for name, shape in result.get("shapes", {}).items():
        kind = "LM heads of their own" if shape["own"] else "a shared LM head"
        heads = f"{shape['heads']} heads with {kind}"
        machine = f"{result['device']}, {shape['dtype']}"
        console.print()
        console.print(Text(f"{name}, random weights, {heads}; {machine}", "bold"))
        show_steps(console, shape)
    for name, reason in result.get("left_out_shapes", {}).items():
        console.print(Text(f"{name} was left out: {reason}", NOTICE))
    if "float32" in result:
        _show_float32(console, result["float32"])


def _show_replies(console: Console, result: Figures) -> None:
    console.print(_modes_table(result))
    for mode, figures in result["modes"].items():
        if len(figures["categories"]) > 1:
            console.print(_categories_table(mode, figures))
            console.print()
    if result["turns"] > 1:
        console.print(_turns_table(result["modes"]))


def _show_float32(console: Console, checks: Figures) -> None:
    console.print()
    console.print(Text(f"bundled model in float32, tree {checks['tree']}", "bold"))
    same = {mode: same_text(check) for mode, check in checks["cpu"].items()}
    console.print(captured_table(checks["eager"], "as on the CPU", same))


def _modes_table(result: Figures) -> Table:
    modes = result["modes"]
    machine = f"{result['model']} on {result['device']}, {result['dtype']}"
    title = f"{machine}; {result['prompts']} prompts x {result['rounds']}"
    step = f"{result['step']}; " if "step" in result else ""
    table = Table("", *modes, title=title, caption=f"{step}tree {result['tree']}")
    _add_rows(table, modes, RATE_ROWS)
    _add_peer_rates(table, result["peers"])
    table.add_section()
    _add_rows(table, modes, MODE_ROWS)
    _add_head_rows(table, modes)
    _add_peer_ratios(table, modes, result["peers"])
    table.add_section()
    if "view" in result:
        share = result["view"]["share_of_tokens_per_second"]
        table.add_row("tokens/s kept with the live view", f"{share:.1%}")
    table.add_row("time to load", f"{result['load_seconds']:.1f} s")
    if result["left_out"]:
        table.add_row("prompts too long for the context", str(result["left_out"]))
    return table


def _add_rows(table: Table, modes: Figures, rows: Sequence[tuple[str, str, str]]) -> None:
    for key, name, form in rows:
        table.add_row(name, *(_figure(form, mode.get(key)) for mode in modes.values()))


def _add_head_rows(table: Table, modes: Figures) -> None:
    rates = [mode["head_acceptance"] for mode in modes.values()]
    for head in sorted(set().union(*rates), key=int):
        name = f"{head_name(int(head))}, accepted when tested"
        table.add_row(name, *(_figure("{:.0%}", rate.get(head)) for rate in rates))


def _add_peer_rates(table: Table, peers: Figures) -> None:
    """Add the tokens/s of each other decoder: without prefill, and with it."""
    for name, peer in peers.items():
        table.add_section()
        table.add_row(f"{name}, tokens/s", _figure("{:.1f}", peer.get("decode_tokens_per_second")))
        table.add_row("  prefill included", f"{peer['tokens_per_second']:.1f}")


def _add_peer_ratios(table: Table, modes: Figures, peers: Figures) -> None:
    """Add our tokens/s over those of each other decoder."""
    for name, peer in peers.items():
        table.add_section()
        decode = peer.get("decode_ratio", {})
        table.add_row(f"over {name}", *(_figure("{:.2f}x", decode.get(mode)) for mode in modes))
        ratios = (f"{peer['ratio'][mode]:.2f}x" for mode in modes)
        table.add_row("  prefill included", *ratios)
        table.add_row("  our vanilla, prefill included", f"{peer['vanilla_ratio']:.2f}x")


def _categories_table(mode: str, figures: Figures) -> Table:
    """Draw one mode's figures by category, with those of all in the last row."""
    names = [*(name for _, name, _ in CATEGORY_COLUMNS), "heads, %"]
    columns = (Column(name, justify="right", no_wrap=True) for name in names)
    table = Table(mode, *columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for category, row in [*figures["categories"].items(), ("all", figures)]:
        name = Text(f"{category} ({row['prompts']})", overflow="ellipsis", no_wrap=True)
        cells = (_figure(form, row[key]) for key, _, form in CATEGORY_COLUMNS)
        style = "bold" if category == "all" else ""
        table.add_row(name, *cells, _head_rates(row["head_acceptance"]), style=style)
    return table


def _head_rates(rates: Mapping[str, float]) -> str:
    heads = sorted(rates, key=int)
    return " ".join(f"{100 * rates[head]:.0f}" for head in heads) or UNKNOWN


def _turns_table(modes: Figures) -> Table:
    names = ("conversations", *modes)
    columns = (Column(name, justify="right") for name in names)
    table = Table("turn", *columns, title="time to first token, and tokens prefilled")
    rows = zip(*(mode["turns"] for mode in modes.values()), strict=False)
    for number, turns in enumerate(rows, 1):
        form = "{time_to_first_token_ms:.1f} ms, {prefilled_tokens}"
        cells = (form.format_map(turn) for turn in turns)
        table.add_row(str(number), str(turns[0]["conversations"]), *cells)
    return table


def _figure(form: str, value: float | None) -> str:
    return UNKNOWN if value is None else form.format(value)
