"""The figures of a reply as one or two rows of text. Every figure comes from Stats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.events import COPIED, Pause
from medusa_chat.terminal.theme import LABEL, STRONG, VALUE, head_style

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from medusa_chat.sampling import Sampling
    from medusa_chat.stats import Speedup, Stats

SEPARATOR = " · "
BLOCKS = "▁▂▃▄▅▆▇█"
UNKNOWN = "–"
BASELINE = "the baseline of every speedup"
PER_STEP = " tokens per step"
FINISHES = {
    "length": "length limit",
    "context": "context is full",
    "stop": "stop string",
    "loop": "repeats itself",
}


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Format a figure; a dash if it was not measured."""
    return UNKNOWN if value is None else f"{value:.{digits}f}{unit}"


def mode_label(sampling: Sampling) -> str:
    """Name the mode, with its temperature if it samples."""
    if sampling.greedy:
        return sampling.mode
    return f"{sampling.mode} {sampling.temperature:g}"


def panel(stats: Stats, conversation: Stats, sampling: Sampling, width: int) -> list[Text]:
    """Draw the live panel: at most two rows of at most `width` cells."""
    if not stats.steps:
        reading = [Text(mode_label(sampling)), Text("reading the prompt…", LABEL)]
        return [fit([reading], width)]
    return [
        _headline(stats, sampling, width),
        _second_row(stats, conversation, sampling, width),
    ]


def footer(last: Stats, conversation: Stats, sampling: Sampling, width: int) -> Text:
    """Sum up a finished reply in one dim row."""
    finish = [Text(FINISHES[last.finish])] if last.finish in FINISHES else []
    variants = [[*items, *finish] for items in _footer_rows(last, conversation, sampling)]
    if finish:
        variants.append(finish)
    row = fit(variants, width)
    row.stylize(LABEL)
    return row


def faster(speedup: float) -> str:
    """Word a speedup: how much faster or slower decoding is with heads."""
    if speedup >= 1.05:
        return f"{speedup:.1f}x faster"
    return f"{speedup:.2f}x as fast"


def speedup_words(speedup: Speedup | None) -> tuple[str, str, str]:
    """Say how much faster the heads make decoding, and how far it can be trusted: 3 lengths."""
    if speedup is None:
        return ("too short to measure the speedup", "speedup not measured", f"speedup {UNKNOWN}")
    short = faster(speedup.value)
    joint = "than" if short.endswith("faster") else "as"
    count = f"{speedup.comparisons} comparisons"
    scope = "this reply" if speedup.of_reply else "this conversation"
    long = f"{short} {joint} without heads ({count} in {scope})"
    return (long, f"{short} ({count})", short)


def gauge(rate: float, length: int, head: int) -> Text:
    """Draw a rate as `length` cells; the filled part differs in shape too, not only in colour."""
    filled = round(rate * length)
    return Text.assemble(("━" * filled, head_style(head)), ("╌" * (length - filled), LABEL))


def fit(variants: Iterable[Sequence[Text]], width: int) -> Text:
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
        return fit([[mode, tokens, long_speed], [short_speed]], width)
    length = number(stats.acceptance_length, 1)
    long_length = _item("", length, PER_STEP)
    short_length = _item("", length, "/step")
    variants = [
        [mode, tokens, long_speed, long_length],
        [mode, long_speed, long_length],
        [mode, tokens, short_speed, short_length],
        [short_speed, short_length],
        [short_speed],
    ]
    return fit(variants, width)


def _second_row(stats: Stats, conversation: Stats, sampling: Sampling, width: int) -> Text:
    if sampling.mode == "vanilla":
        long = Text(f"vanilla decoding is {BASELINE}", LABEL)
        return fit([[long], [Text("baseline")]], width)
    if stats.paused:
        return fit(_pause_rows(stats.paused), width)
    return fit(_measured_rows(stats, conversation), width)


def _pause_rows(pause: Pause) -> list[list[Text]]:
    """Explain why the heads are paused, from the widest row to the narrowest."""
    speedup = number(pause.speedup, 2, "x")
    reason = Text(str(pause), LABEL)
    return [[reason], [_item("heads paused: ", speedup)], [_item("paused: ", speedup)]]


def _measured_rows(stats: Stats, conversation: Stats) -> Iterator[list[Text]]:
    """Yield rows from the widest to the narrowest, one by one because the panel is drawn often."""
    words = speedup_words(stats.shown_speedup(conversation))
    if stats.shown_speedup(conversation) is None:
        words = ("measuring the speedup…", "measuring…", "…")
    speedups = [Text(each, STRONG) for each in words]
    if not stats.reached:  # no head's guess was tested yet
        yield from ([speedup] for speedup in speedups)
        return
    for length in (12, 8, 5, 3):
        yield [speedups[0], _gauges(stats, length)]
    for length in (8, 5, 3, 0):
        yield [speedups[1], _gauges(stats, length)]
    yield [speedups[1], _blocks(stats)]
    yield [speedups[2], _blocks(stats)]
    yield [speedups[2]]


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
        reason = Text(f"heads paused: slower here ({number(last.paused.speedup, 2, 'x')})")
        return [[speed, reason], [speed, Text("heads paused")], [Text("heads paused")]]
    if last.acceptance_length is None:
        return [[Text(mode_label(sampling)), speed], [speed]]
    length = Text(f"{number(last.acceptance_length, 1)}{PER_STEP}")
    long, short, shortest = map(Text, speedup_words(last.shown_speedup(conversation)))
    return [
        [length, long, speed],
        [length, short, speed],
        [length, short],
        [length, shortest],
        [length],
    ]
