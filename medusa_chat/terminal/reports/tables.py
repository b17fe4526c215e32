"""The chat's tables: `/stats`, `/heads`, `/set`, `/help`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from medusa_chat.sampling import Sampling
from medusa_chat.settings import help_of
from medusa_chat.terminal.panel import UNKNOWN, gauge, number
from medusa_chat.terminal.theme import LABEL, STRONG, head_name, head_style

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.stats import Stats
    from medusa_chat.terminal.chat.engine import ChatEngine

GAUGE = 20  # cells
PAUSED = "steps while heads were paused"

FIGURES: tuple[tuple[str, Callable[[Stats], str]], ...] = (
    ("new tokens", lambda stats: str(stats.new_tokens)),
    ("steps", lambda stats: str(stats.steps)),
    ("tokens/s", lambda stats: number(stats.tokens_per_second, 1)),
    ("acceptance length", lambda stats: number(stats.acceptance_length)),
)

COMPARED: tuple[tuple[str, Callable[[Stats], str]], ...] = (
    ("vanilla tokens/s", lambda stats: number(stats.vanilla_tokens_per_second, 1)),
    ("step cost", lambda stats: number(stats.overhead, 2, "x")),
    ("speedup", lambda stats: number(stats.speedup, 2, "x")),
)


def stats_table(last: Stats, conversation: Stats, engine: ChatEngine) -> Table:
    """Draw all figures of the last reply, and those of the conversation."""
    table = _table("", "this reply", "conversation", right=(1, 2))
    for name, figure in FIGURES:
        table.add_row(name, figure(last), figure(conversation))
    for name, figure in COMPARED:
        cells = (figure(stats) if stats.comparable else UNKNOWN for stats in (last, conversation))
        table.add_row(name, *cells, style=STRONG if name == "speedup" else "")
    table.add_row("comparisons", str(last.comparisons), str(conversation.comparisons))
    if conversation.paused_steps:
        table.add_row(PAUSED, str(last.paused_steps), str(conversation.paused_steps))
    rates_of_last = last.head_acceptance()
    for head, rate in conversation.head_acceptance().items():
        label = Text(f"accepted of {head_name(head)}", head_style(head))
        table.add_row(label, _percent(rates_of_last.get(head)), _percent(rate))
    table.add_row("prefill", f"{engine.prefilled} tokens", UNKNOWN)
    table.add_row("prefill time", number(engine.prefill_seconds, 3, " s"), UNKNOWN)
    return table


def heads_table(stats: Stats) -> Table:
    """Draw each head's tested guesses, and how many of them were accepted."""
    table = _table("", "guesses", "tested", "accepted", "rate", "", right=(2, 3, 4))
    for head, rate in stats.head_acceptance().items():
        table.add_row(
            Text(f"■ {head_name(head)}", head_style(head)),
            f"token +{head}" if head > 0 else "any token",
            str(stats.reached[head]),
            str(stats.accepted[head]),
            _percent(rate),
            gauge(rate, GAUGE, head),
        )
    return table


def settings_table(sampling: Sampling) -> Table:
    """Draw all settings with their values."""
    table = _table("setting", "value", "")
    texts = help_of(Sampling)
    for name, value in asdict(sampling).items():
        table.add_row(name, Text(shown(value), STRONG), Text(texts[name], LABEL))
    return table


def help_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Draw commands with their arguments and their help."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", min_width=12)
    table.add_column(overflow="fold", style=LABEL)
    for usage, text in rows:
        table.add_row(Text(usage), Text(text))
    return table


def shown(value: object) -> str:
    """Format a setting's value as `/set` takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(*columns: str, right: Iterable[int] = ()) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, header_style=LABEL, border_style=LABEL, show_edge=False, pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


def _percent(rate: float | None) -> str:
    return UNKNOWN if rate is None else f"{rate:.1%}"
