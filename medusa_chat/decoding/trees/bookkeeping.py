"""Time of a step that its forward does not take: choices, copies, text, learning. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa_chat.events import Step, StepKind

MEMORY = 64  # steps after which a step counts 1/e of a new one
# Seconds before any step was seen: what the bundled model's steps take on processors of 2024.
USUAL: dict[StepKind, float] = {"tree": 3e-4, "vanilla": 1e-4}
OUTLIER = 4.0  # times the mean; a pause of the machine counts as no more


class Bookkeeping:
    """Seconds of a step outside of the runner, by its kind: means over the last steps.

    A small model's forward takes no longer than this, and it is the same for trees of every size.
    """

    def __init__(self, *, hidden: bool = False) -> None:
        """Start with what is usual.

        Args:
            hidden: it takes no time, because the next forward runs meanwhile.
        """
        self._hidden = hidden
        self._means = dict.fromkeys(USUAL, 0.0) if hidden else dict(USUAL)
        self._learning = 0.0  # seconds that count with the next tree step

    def settle(self, step: Step, forward: float, learning: float) -> Step:
        """Take in a step, and return it with the time of learning.

        That counts with tree steps alone, because vanilla decoding learns nothing.

        Args:
            step: with the seconds that it took without learning.
            forward: seconds of it in the runner.
            learning: seconds that the policy learned from it.
        """
        self._learning += learning
        if step.kind == "tree":
            step = replace(step, seconds=step.seconds + self._learning)
            self._learning = 0.0
        self.add(step.kind, step.seconds - forward)
        return step

    def add(self, kind: StepKind, seconds: float) -> None:
        """Take in what a step took beside its forward."""
        if not self._hidden:
            mean = self._means[kind]
            self._means[kind] += (min(seconds, OUTLIER * mean) - mean) / MEMORY

    def of(self, kind: StepKind) -> float:
        """Seconds of a step of this kind."""
        return self._means[kind]
