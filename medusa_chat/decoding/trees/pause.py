"""Pause the heads where they make decoding slower than vanilla. No torch here."""

from __future__ import annotations

from math import inf, sqrt
from statistics import fmean, median, pvariance
from typing import TYPE_CHECKING

from medusa_chat.events import Pause
from medusa_chat.stats import Stats

if TYPE_CHECKING:
    from medusa_chat.events import Step

WINDOW = 64  # tree steps that the speedup is measured over
LEAST_STEPS = 24  # tree steps before a pause
LEAST_PROBES = 5  # vanilla steps before a pause
# Tree steps before each probe, a vanilla step to measure the speedup by; the last number repeats.
PROBE_GAPS = (2, 2, 3, 4, 6, 8, 24)
FIRST_PAUSE = 256  # tokens; each pause that follows another without a gain is twice as long
LONGEST_PAUSE = 8192
ERRORS = 2.0  # standard errors between a measured figure and its bound
SPREAD = 0.05  # least deviation of the overhead's ratios, however alike the first few are


def speedup_bound(stats: Stats) -> float:
    """Upper confidence bound of the speedup; infinite for too few steps."""
    steps = len(stats.lengths)
    probes = len(stats.overheads)
    if steps < LEAST_STEPS or probes < LEAST_PROBES:
        return inf
    # Steps that were all alike might have held one more accepted guess.
    length_error = sqrt((pvariance(stats.lengths) + 1 / steps) / steps)
    overhead = median(stats.overheads)
    # The median absolute deviation ignores a step that another program held up.
    deviation = 1.4826 * median(abs(ratio - overhead) for ratio in stats.overheads)
    overhead_error = 1.2533 * max(deviation, SPREAD * overhead) / sqrt(probes)
    least_overhead = overhead - ERRORS * overhead_error
    if least_overhead <= 0:
        return inf
    return (fmean(stats.lengths) + ERRORS * length_error) / least_overhead


class PauseRule:
    """Pauses the heads once the upper bound of their speedup is below 1.

    Attributes:
        stats: the steps since the heads were last switched on.
        pause: the pause and what is left of it; None while the heads are in use.
    """

    def __init__(self, *, probing: bool) -> None:
        """Start with the heads in use.

        Args:
            probing: take vanilla steps now and then; without them nothing is ever paused.
        """
        self._probing = probing
        self._next_pause = FIRST_PAUSE
        self.restart()

    def restart(self) -> None:
        """Use the heads, and judge them by later steps alone."""
        self.pause: Pause | None = None
        self.stats = Stats(window=WINDOW)
        self._probes = 0
        self._since_probe = 0

    def probe_due(self) -> bool:
        """Report that the next step is a probe, or count it as a tree step.

        The count goes on over replies, so that short ones need no probe each.
        """
        gap = PROBE_GAPS[min(self._probes, len(PROBE_GAPS) - 1)]
        if not self._probing or self._since_probe < gap:
            self._since_probe += 1
            return False
        self._probes += 1
        self._since_probe = 0
        return True

    def add(self, step: Step, *, may_pause: bool) -> None:
        """Take in a step of a mode that uses heads."""
        if self.pause is not None:
            self._shorten(self.pause, len(step.tokens))
            return
        self.stats.add(step)
        if step.kind == "tree" or not may_pause:
            return  # judged at the probes, which bring the comparisons
        speedup = self.stats.speedup
        if speedup is None:
            return
        if speedup_bound(self.stats) < 1:
            self.pause = Pause(speedup, self.stats.tree_steps, self._next_pause)
            self.stats = Stats(window=WINDOW)
            self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
        elif speedup > 1 and self.stats.tree_steps == WINDOW:
            self._next_pause = FIRST_PAUSE

    def _shorten(self, pause: Pause, tokens: int) -> None:
        left = pause.retry_in - tokens
        if left > 0:
            self.pause = Pause(pause.speedup, pause.steps, left)
        else:
            self.restart()
