"""Counts by key that fade as new steps arrive. No torch here."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

Key = TypeVar("Key", bound="Hashable")
LARGEST_UNIT = 1e6
NEGLIGIBLE = 1e-3  # in units of now; a smaller count is dropped when counts are rescaled


class FadingCounter(Generic[Key]):
    """Amounts per step by key; each new step makes the earlier ones count a little less."""

    def __init__(self, memory: int, prior: float) -> None:
        """Start without a step.

        Args:
            memory: steps after which a step counts 1/e of a new one.
            prior: steps that the rate from before counts for.
        """
        self._growth = memory / (memory - 1)
        self._prior = prior
        self._steps = 0.0
        # A new step counts more than the earlier ones. That equals fading them all, at no cost.
        self._unit = 1.0
        self._amounts: dict[Key, float] = defaultdict(float)

    def begin_step(self) -> None:
        """Count one step more; later amounts belong to it."""
        self._unit *= self._growth
        if self._unit > LARGEST_UNIT:
            self._rescale()
        self._steps += self._unit

    def add(self, key: Key, amount: float = 1.0) -> None:
        """Add an amount to the current step."""
        self._amounts[key] += amount * self._unit

    def rate(self, key: Key, before: float = 0.0) -> float:
        """Amount per step of a key, where `before` was its rate in the prior's steps."""
        amount = self._amounts.get(key, 0.0) / self._unit
        return (amount + self._prior * before) / (self._steps / self._unit + self._prior)

    def clear(self) -> None:
        """Forget all steps."""
        self._amounts.clear()
        self._steps = 0.0

    def __iter__(self) -> Iterator[Key]:
        return iter(self._amounts)

    def _rescale(self) -> None:
        for key, amount in list(self._amounts.items()):
            if abs(amount) > NEGLIGIBLE * self._unit:
                self._amounts[key] = amount / self._unit
            else:
                del self._amounts[key]
        self._steps /= self._unit
        self._unit = 1.0
