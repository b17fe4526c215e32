"""A race as rows of text, as it stood at a time: two columns, or two blocks if it is narrow."""

from __future__ import annotations

from itertools import zip_longest
from math import inf
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.stats import Stats
from medusa_chat.terminal.panel import FINISHES, faster, fit, number
from medusa_chat.terminal.theme import LABEL, STRONG, head_mark, head_style
from medusa_chat.terminal.wrapping import wrapped
from medusa_chat.text import common_prefix, sanitize

if TYPE_CHECKING:
    from medusa_chat.events import Step
    from medusa_chat.terminal.race.lanes import Race

NARROW = 60  # cells below which the runs are stacked
BETWEEN = " │ "
HEADER = 2  # rows: title and figures
HOW = (
    "each ran alone, the one with heads first; their times count what they computed, without"
    " reading the prompt"
)


def standing(
    race: Race, clock: float, width: int, most: int | None = None, *, marks: bool = False
) -> list[Text]:
    """Draw both runs as they stood at a time.

    Args:
        race: the runs.
        clock: seconds since each began.
        width: of the screen.
        most: rows of text that each run shows, its last ones; None shows all. Rows that are still
            empty are drawn too, so that nothing jumps.
        marks: mark tokens with their heads.
    """
    stacked = width < NARROW
    cells = width if stacked else (width - len(BETWEEN)) // 2
    bodies = [_body(lane.until(clock), cells, marks) for lane in race.lanes]
    if most is not None:
        rows = min(most, max(len(_body(lane.until(inf), cells, marks)) for lane in race.lanes))
        bodies = [body[-rows:] + [Text()] * (rows - len(body)) for body in bodies]
    left, right = (
        [Text(lane.title, STRONG), _figures(Stats.of(lane.until(clock)), clock, cells), *body]
        for lane, body in zip(race.lanes, bodies, strict=True)
    )
    if stacked:
        return [*left, Text(), *right]
    pairs = zip_longest(left, right, fillvalue=Text())
    return [_joined(one, other, cells) for one, other in pairs]


def _joined(left: Text, right: Text, cells: int) -> Text:
    padded = left.copy()
    padded.pad_right(cells - left.cell_len)
    return Text.assemble(padded, (BETWEEN, LABEL), right)


def _body(steps: list[Step], width: int, marks: bool) -> list[Text]:
    """Wrap the text of some steps, coloured by head."""
    text = Text()
    for token in (token for step in steps for token in step.tokens):
        style = head_style(token.head)
        mark = head_mark(token.head) if marks and token.text.strip() else ""
        text.append(sanitize(token.text), style).append(mark, style)
    start = len(text.plain) - len(text.plain.lstrip())
    return wrapped(text[start:], width)


def _figures(stats: Stats, clock: float, width: int) -> Text:
    speed = Text(f"{number(stats.tokens_per_second, 1)} tokens/s")
    if not stats.finish:
        count = Text(f"{stats.new_tokens} tokens after {clock:.1f} s")
        return fit([[speed, count], [speed]], width)
    done = Text(f"done after {stats.seconds:.2f} s")
    count = Text(f"{stats.new_tokens} tokens")
    reason = [Text(FINISHES[stats.finish])] if stats.finish in FINISHES else []
    return fit([[speed, done, count, *reason], [speed, done, count], [speed, done]], width)


def verdict(race: Race) -> Text:
    """Sum up a finished race: how much faster, and whether both wrote the same."""
    if race.speedup is None:
        return Text("nothing to compare: the reply is empty", LABEL)
    fast, slow = race.medusa.stats, race.vanilla.stats
    words = f"{faster(race.speedup)} with heads"
    speeds = f"{number(fast.tokens_per_second, 1)} against {number(slow.tokens_per_second, 1)}"
    return Text.assemble(
        (words, STRONG), (f" · {speeds} tokens/s · {_comparison(race)}\n{HOW}", LABEL)
    )


def _comparison(race: Race) -> str:
    if race.same_text is None:
        return "typical sampling writes its own text: compare only the speed"
    if race.same_text:
        return "the same text"
    equal = common_prefix(race.vanilla.ids, race.medusa.ids)
    return f"the texts differ from token {equal + 1} on; medusa-chat verify says why"
