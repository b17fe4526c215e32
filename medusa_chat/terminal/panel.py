"""The figures of a reply as one or two rows of text. Every figure comes from Stats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.events import COPIED, Pause
from medusa_chat.terminal.theme import LABEL, STRONG, VALUE, head_style

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from medusa_chat.config import Sampling
    from medusa_chat.stats import Stats

SEPARATOR = " · "
SPARKS = "▁▂▃▄▅▆▇█"
UNKNOWN = "–"
BASELINE = "the baseline of every speedup"
FINISHES = {"length": "length limit", "context": "context is full", "stop": "stop string"}


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}{unit}"


def mode_label(sampling: Sampling) -> str:
    """The mode, and its temperature where it samples."""
    return sampling.mode if sampling.greedy else f"{sampling.mode} {sampling.temperature:g}"


def item(label: str, value: str, tail: str = "") -> Text:
    return Text.assemble((label, LABEL), (value, VALUE), (tail, LABEL))


def fit(variants: Iterable[Sequence[Text]], width: int) -> Text:
    """The first variant that fits in `width`, joined to one row; the last one is cut if need be."""
    for items in variants:
        row = Text.assemble(*[part for entry in items for part in ((SEPARATOR, LABEL), entry)][1:])
        if row.cell_len <= width:
            return row
    row.truncate(width, overflow="ellipsis")
    return row


def panel(stats: Stats, sampling: Sampling, width: int) -> list[Text]:
    """The live panel: at most two rows of at most `width` cells."""
    if not stats.steps:
        return [fit([[item("", mode_label(sampling)), item("reading the prompt…", "")]], width)]
    return [_headline(stats, sampling, width), _second_row(stats, sampling, width)]


def _headline(stats: Stats, sampling: Sampling, width: int) -> Text:
    mode = Text(mode_label(sampling), STRONG)
    tokens = item("", str(stats.new_tokens), " tokens")
    rate = number(stats.tokens_per_second, 1)
    length = number(stats.acceptance_length)
    if sampling.mode == "vanilla" or stats.paused:
        return fit([[mode, tokens, item("", rate, " tokens/s")], [item("", rate, " tok/s")]], width)
    return fit(
        [
            [mode, tokens, item("", rate, " tokens/s"), item("acceptance length ", length)],
            [mode, tokens, item("", rate, " tok/s"), item("accepts ", length)],
            [item("", rate, " tok/s"), item("accepts ", length)],
            [item("", rate, " tok/s")],
        ],
        width,
    )


def _second_row(stats: Stats, sampling: Sampling, width: int) -> Text:
    if sampling.mode == "vanilla":
        return fit([[item("vanilla decoding is ", "", BASELINE)], [item("", "baseline")]], width)
    if stats.paused:
        return fit(_gated_rows(stats.paused), width)
    return fit(([part for part in parts if part] for parts in _measured_rows(stats)), width)


def _gated_rows(paused: Pause) -> list[list[Text]]:
    """Why a mode with heads decodes vanilla, from the widest to the narrowest."""
    speedup, again = number(paused.speedup, 2, "×"), f"{paused.retry_in} tokens"
    pay = item("heads do not pay here: ", speedup, f" over the last {paused.steps} steps")
    short = item("heads do not pay: ", speedup)
    return [
        [pay, item("decoding vanilla, trying again in ", again)],
        [pay, item("vanilla for ", again)],
        [short, item("vanilla for ", again)],
        [short, Text("vanilla")],
        [item("vanilla: ", speedup)],
    ]


def _measured_rows(stats: Stats) -> Iterator[list[Text]]:
    """From the widest to the narrowest; made one by one, as this is drawn often."""
    speedup = speedup_item(stats.speedup, " measured here")
    overhead = item("overhead ", number(stats.overhead, 2, "×"))
    for length in (12, 8, 5, 3, 0):
        yield [speedup, overhead, gauges(stats, length)]
    yield [speedup, overhead, sparks(stats)]
    yield [speedup, sparks(stats)]
    yield [speedup]
    yield [speedup_item(stats.speedup)]


def speedup_item(speedup: float | None, tail: str = "") -> Text:
    if speedup is None:
        return item("speedup: ", "", "measuring…")
    return Text.assemble(("speedup ", LABEL), (number(speedup, 2, "×"), STRONG), (tail, LABEL))


def bar(rate: float, length: int, head: int) -> Text:
    """A gauge of `length` cells; filled and empty part differ in shape too, for screens without colour."""
    filled = round(rate * length)
    return Text.assemble(("━" * filled, head_style(head)), ("╌" * (length - filled), LABEL))


def gauges(stats: Stats, length: int) -> Text:
    """Acceptance of each head: number (c: copied), gauge of `length` cells, percent, in the head's colour."""
    parts = []
    for head, rate in stats.head_acceptance().items():
        gauge = bar(rate, length, head) + Text(" ") if length else Text()
        name = "c" if head == COPIED else str(head)
        parts.append(Text.assemble((f"{name} ", head_style(head)), gauge, (f"{rate:.0%}", LABEL)))
    return Text("  ").join(parts)


def sparks(stats: Stats) -> Text:
    """Acceptance of each head as one block each, for narrow terminals."""
    blocks = [
        (SPARKS[min(int(rate * len(SPARKS)), len(SPARKS) - 1)], head_style(head))
        for head, rate in stats.head_acceptance().items()
    ]
    return Text.assemble(*blocks)


def footer(last: Stats, conversation: Stats, sampling: Sampling, width: int) -> Text:
    """What stays under a finished reply: one dim row."""
    rate = item("", number(last.tokens_per_second, 1), " tokens/s")
    finish = [Text(FINISHES[last.finish])] if last.finish in FINISHES else []
    if last.paused:
        speedup = number(last.paused.speedup, 2, "×")
        variants = [
            [rate, Text(f"vanilla: heads do not pay here ({speedup})"), *finish],
            [rate, Text("vanilla"), *finish],
        ]
        variants += [finish or [Text("vanilla")]]
    elif last.acceptance_length is None:
        variants = [[Text(mode_label(sampling)), rate, *finish], [rate, *finish], finish or [rate]]
    else:
        length = item("acceptance length ", number(last.acceptance_length))
        accepts = item("accepts ", number(last.acceptance_length))
        long, short = _measured(last, conversation)
        variants = [
            [length, rate, long, *finish],
            [length, rate, short, *finish],
            [accepts, short, *finish],
        ]
        variants += [[accepts, *finish], finish or [short]]
    row = fit(variants, width)
    row.stylize(LABEL)
    return row


def _measured(last: Stats, conversation: Stats) -> tuple[Text, Text]:
    """The speedup of the reply; where it was too short to hold a vanilla step, that of the conversation."""
    if last.speedup is None and conversation.speedup is None:
        return Text("speedup not measured yet"), Text("speedup –")
    where = "here" if last.speedup is not None else "over this conversation"
    speedup = last.speedup if last.speedup is not None else conversation.speedup
    return Text(f"speedup {number(speedup, 2, '×')} measured {where}"), Text(
        f"speedup {number(speedup, 2, '×')}"
    )
