"""A race on the screen: the second run is drawn while it computes, beside the first one."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.terminal.chat.keyboard import QuietInput, Signals
from medusa_chat.terminal.live import LiveRows
from medusa_chat.terminal.race.columns import HEADER, NARROW, standing, verdict
from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.wrapping import wrapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from medusa_chat.terminal.race.lanes import Lane, Race

STOPPED = "race stopped; the conversation is as it was"


def show_race(console: Console, race: Race, *, marks: bool = False, plain: bool = False) -> bool:
    """Run a race and show it; return False if Ctrl-C stopped it.

    Args:
        console: the screen.
        race: two runs that have not begun.
        marks: mark tokens with their heads.
        plain: print the result only, and redraw nothing.

    Raises:
        Exception: whatever the engine raises.
    """
    live = LiveRows(console)
    quiet = QuietInput()
    draws = not plain and console.is_terminal

    def suspend() -> None:
        quiet.pause()
        live.leave()

    def resume() -> None:
        quiet.resume()
        live.enter()

    try:
        if not draws:
            _run_unseen(race)
        else:
            with quiet, Signals(suspend, resume) as signals, live:
                _run_seen(race, live, signals.check, marks)
    except KeyboardInterrupt:
        console.print(Text(STOPPED, LABEL))
        return False
    end = max(lane.seconds for lane in race.lanes)
    rows = standing(race, end, console.width, marks=marks)
    for row in [*rows, Text(), *wrapped(verdict(race), console.width)]:
        console.print(row, soft_wrap=True)
    return True


def _run_unseen(race: Race) -> None:
    race.warm_up()
    for lane in (race.medusa, race.vanilla):
        for _ in race.run(lane):
            pass


def _run_seen(race: Race, live: LiveRows, check: Callable[[], None], marks: bool) -> None:
    """Run the lane with heads under a count of its tokens, then the other one in full view."""

    def draw(clock: float) -> None:
        live.draw(
            lambda width, height: standing(
                race, clock, width, _text_rows(width, height), marks=marks
            )
        )

    live.draw(lambda width, _: [_progress(race.medusa, width)], now=True)
    race.warm_up()
    with closing(race.run(race.medusa)) as steps:
        for _ in steps:
            live.draw(lambda width, _: [_progress(race.medusa, width)])
            check()
    with closing(race.run(race.vanilla)) as steps:
        for _ in steps:
            draw(race.vanilla.seconds)
            check()
    began = time.monotonic() - race.vanilla.seconds
    while (clock := time.monotonic() - began) < race.medusa.seconds:  # heads were slower
        draw(clock)
        check()
        time.sleep(0.02)


def _progress(lane: Lane, width: int) -> Text:
    count = f"{lane.stats.new_tokens} tokens"
    row = Text(f"{lane.title} runs first, alone: {count} … then both are shown", LABEL)
    row.truncate(width, overflow="ellipsis")
    return row


def _text_rows(width: int, height: int) -> int:
    """Choose the rows of text: all rows fit even in a terminal that is made half as wide."""
    blocks = 2 if width < NARROW else 1
    return max(1, height // 2 // blocks - HEADER - 1)
