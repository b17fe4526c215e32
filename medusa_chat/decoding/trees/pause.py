"""Whether the heads pay in this conversation: rolling measurements, and a gate that shuts if not. No torch."""

from __future__ import annotations

from collections import deque
from statistics import fmean, median, pvariance

from medusa_chat.events import Pause, Step

WINDOW = 64  # tree steps that the acceptance length is taken over
PROBES = 32  # vanilla steps that the overhead is taken over
LEAST_STEPS, LEAST_PROBES = 24, 5  # before any verdict
FIRST_REST, LONGEST_REST = (
    256,
    8192,
)  # tokens before the heads are tried again; twice as many each time in vain
ERRORS = 2.0  # standard errors by which acceptance length and overhead are given the benefit of the doubt
SPREAD = 0.05  # the overhead's ratios are taken to vary by at least this share, however alike the first few are


class Evidence:
    """What the last tree steps brought, and what they cost beside the vanilla steps taken among them."""

    def __init__(self) -> None:
        self.lengths: deque[int] = deque(maxlen=WINDOW)
        self.ratios: deque[float] = deque(maxlen=PROBES)
        self._before: Step | None = None

    def add(self, step: Step) -> None:
        """Take in a step as `Stats` does: a vanilla step is compared with the tree step right before it."""
        before, self._before = self._before, None if step.finish else step
        if step.kind == "tree":
            self.lengths.append(step.settled)
        elif before is not None and before.kind == "tree":
            self.ratios.append(before.seconds / step.seconds)

    @property
    def length(self) -> float | None:
        """Acceptance length."""
        return fmean(self.lengths) if self.lengths else None

    @property
    def speedup(self) -> float | None:
        return fmean(self.lengths) / median(self.ratios) if self.lengths and self.ratios else None

    @property
    def best_case(self) -> float:
        """A speedup that the true one is hardly above; infinite for too little evidence."""
        if len(self.lengths) < LEAST_STEPS or len(self.ratios) < LEAST_PROBES:
            return float("inf")
        steps, overhead = len(self.lengths), median(self.ratios)
        # Steps that were all alike might have held one more accepted guess.
        length_error = ((pvariance(self.lengths) + 1 / steps) / steps) ** 0.5
        # From the median absolute deviation: a step that the machine held up must not blur the rest.
        deviation = 1.4826 * median(abs(ratio - overhead) for ratio in self.ratios)
        overhead_error = 1.2533 * max(deviation, SPREAD * overhead) / len(self.ratios) ** 0.5
        least = overhead - ERRORS * overhead_error
        return (fmean(self.lengths) + ERRORS * length_error) / least if least > 0 else float("inf")


class Gate:
    """Shuts when even the best case of the evidence is no speedup; opens again after so many tokens.

    Attributes:
        evidence: since the gate last opened.
    """

    def __init__(self) -> None:
        self.evidence = Evidence()
        self._shut: Pause | None = None
        self._rest = FIRST_REST

    @property
    def paused(self) -> Pause | None:
        """Why the heads rest, or None while they are used."""
        return self._shut

    def open(self) -> None:
        """Try the heads, and judge them by what is measured from now on."""
        self._shut, self.evidence = None, Evidence()

    def record(self, step: Step) -> None:
        """Take in a step that a mode with heads took."""
        if self._shut is not None:
            left = self._shut.retry_in - len(step.tokens)
            self._shut = Pause(self._shut.speedup, self._shut.steps, left) if left > 0 else None
            return
        self.evidence.add(step)
        speedup = self.evidence.speedup
        if speedup is not None and self.evidence.best_case < 1:
            self._shut = Pause(speedup, len(self.evidence.lengths), self._rest)
            self._rest = min(2 * self._rest, LONGEST_REST)
            self.evidence = Evidence()
        elif speedup is not None and speedup > 1 and len(self.evidence.lengths) == WINDOW:
            self._rest = FIRST_REST
