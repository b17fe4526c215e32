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
BLOCKS = "▁▂▃▄▅▆▇█"
UNKNOWN = "–"
BASELINE = "the baseline of every speedup"
FINISHES = {"length": "length limit", "context": "context is full", "stop": "stop string"}


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Format a figure; a dash if it was not measured."""
    return UNKNOWN if value is None else f"{value:.{digits}f}{unit}"


def mode_label(sampling: Sampling) -> str:
    """Name the mode, with its temperature if it samples."""
    if sampling.greedy:
        return sampling.mode
    return f"{sampling.mode} {sampling.temperature:g}"


def panel(stats: Stats, sampling: Sampling, width: int) -> list[Text]:
    """Draw the live panel: at most two rows of at most `width` cells."""
    if not stats.steps:
        reading = [Text(mode_label(sampling)), Text("reading the prompt…", LABEL)]
        return [_fit([reading], width)]
    return [_headline(stats, sampling, width), _second_row(stats, sampling, width)]


def footer(last: Stats, conversation: Stats, sampling: Sampling, width: int) -> Text:
    """Sum up a finished reply in one dim row."""
    finish = [Text(FINISHES[last.finish])] if last.finish in FINISHES else []
    variants = [[*items, *finish] for items in _footer_rows(last, conversation, sampling)]
    if finish:
        variants.append(finish)
    row = _fit(variants, width)
    row.stylize(LABEL)
    return row


def gauge(rate: float, length: int, head: int) -> Text:
    """Draw a rate as `length` cells; the filled part differs in shape too, not only in colour."""
    filled = round(rate * length)
    return Text.assemble(("━" * filled, head_style(head)), ("╌" * (length - filled), LABEL))


def _fit(variants: Iterable[Sequence[Text]], width: int) -> Text:
    """Join the first variant that fits in `width`; cut the last one if none does."""
    separator = Text.assemble((SEPARATOR, LABEL))
    for items in variants:
        row = separator.join(items)
        if row.cell_len <= width:
            return row
    row.truncate(width, overflow="ellipsis")
    return row


def _item(label: str, value: str, tail: str = "") -> Text:
    return Text.assemble((label, LABEL), (value, VALUE), (tail, LABEL))


def _headline(stats: Stats, sampling: Sampling, width: int) -> Text:
    mode = Text(mode_label(sampling), STRONG)
    tokens = _item("", str(stats.new_tokens), " tokens")
    speed = number(stats.tokens_per_second, 1)
    long_speed = _item("", speed, " tokens/s")
    short_speed = _item("", speed, " tok/s")
    if sampling.mode == "vanilla" or stats.paused:
        return _fit([[mode, tokens, long_speed], [short_speed]], width)
    length = number(stats.acceptance_length)
    long_length = _item("acceptance length ", length)
    short_length = _item("accepts ", length)
    variants = [
        [mode, tokens, long_speed, long_length],
        [mode, tokens, short_speed, short_length],
        [short_speed, short_length],
        [short_speed],
    ]
    return _fit(variants, width)


def _second_row(stats: Stats, sampling: Sampling, width: int) -> Text:
    if sampling.mode == "vanilla":
        long = Text(f"vanilla decoding is {BASELINE}", LABEL)
        return _fit([[long], [Text("baseline")]], width)
    if stats.paused:
        return _fit(_pause_rows(stats.paused), width)
    return _fit(_measured_rows(stats), width)


def _pause_rows(pause: Pause) -> list[list[Text]]:
    """Explain why the heads are paused, from the widest row to the narrowest."""
    speedup = number(pause.speedup, 2, "×")
    reason = Text(str(pause), LABEL)
    return [[reason], [_item("heads paused: ", speedup)], [_item("paused: ", speedup)]]


def _measured_rows(stats: Stats) -> Iterator[list[Text]]:
    """Yield rows from the widest to the narrowest, one by one because the panel is drawn often."""
    speedup = _speedup(stats.speedup, " measured here")
    overhead = number(stats.overhead, 2, "×")
    long_cost = _item("each step costs ", overhead, " a plain step")
    short_cost = _item("step cost ", overhead)
    if not stats.reached:  # no head's guess was tested yet
        yield from ([speedup, long_cost], [speedup, short_cost], [speedup])
    else:
        for length in (12, 8, 5, 3):
            yield [speedup, long_cost, _gauges(stats, length)]
        for length in (8, 5, 3, 0):
            yield [speedup, short_cost, _gauges(stats, length)]
        yield [speedup, short_cost, _blocks(stats)]
        yield [speedup, _blocks(stats)]
        yield [speedup]
    yield [_speedup(stats.speedup)]


def _speedup(speedup: float | None, tail: str = "") -> Text:
    if speedup is None:
        return _item("speedup: ", "", "measuring…")
    return Text.assemble(("speedup ", LABEL), (number(speedup, 2, "×"), STRONG), (tail, LABEL))


def _gauges(stats: Stats, length: int) -> Text:
    """Draw each head's acceptance: its number (c for copied), a gauge, and the percentage."""
    parts = []
    for head, rate in stats.head_acceptance().items():
        name = "c" if head == COPIED else str(head)
        part = Text.assemble((f"{name} ", head_style(head)))
        if length:
            part.append_text(gauge(rate, length, head)).append(" ")
        parts.append(part.append(f"{rate:.0%}", LABEL))
    return Text("  ").join(parts)


def _blocks(stats: Stats) -> Text:
    """Draw each head's acceptance as one block, for narrow terminals."""
    row = Text()
    for head, rate in stats.head_acceptance().items():
        level = min(int(rate * len(BLOCKS)), len(BLOCKS) - 1)
        row.append(BLOCKS[level], head_style(head))
    return row


def _footer_rows(last: Stats, conversation: Stats, sampling: Sampling) -> list[list[Text]]:
    """Sum up a reply, from the widest row to the narrowest."""
    speed = Text(f"{number(last.tokens_per_second, 1)} tokens/s")
    if last.paused:
        reason = Text(f"heads paused: slower here ({number(last.paused.speedup, 2, '×')})")
        return [[speed, reason], [speed, Text("heads paused")], [Text("heads paused")]]
    if last.acceptance_length is None:
        return [[Text(mode_label(sampling)), speed], [speed]]
    length = number(last.acceptance_length)
    long_length = Text(f"acceptance length {length}")
    short_length = Text(f"accepts {length}")
    long_speedup, short_speedup = _measured_speedup(last, conversation)
    return [
        [long_length, speed, long_speedup],
        [long_length, speed, short_speedup],
        [short_length, short_speedup],
        [short_length],
    ]


def _measured_speedup(last: Stats, conversation: Stats) -> tuple[Text, Text]:
    """Word a reply's speedup; if it was too short to measure one, the conversation's."""
    if last.speedup is not None:
        speedup, where = number(last.speedup, 2, "×"), "here"
    elif conversation.speedup is not None:
        speedup, where = number(conversation.speedup, 2, "×"), "over this conversation"
    else:
        return Text("too short to measure the speedup"), Text(f"speedup {UNKNOWN}")
    return Text(f"speedup {speedup} measured {where}"), Text(f"speedup {speedup}")
