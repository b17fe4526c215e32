"""Choose the fastest tree from what steps cost and how often the heads are right. No torch here."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from medusa_chat.decoding.trees.growth import likeliest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from medusa_chat.decoding.trees.accuracy import Frequencies


@dataclass(frozen=True)
class StepCost:
    """Measured seconds of a step.

    Attributes:
        vanilla: seconds of a vanilla step.
        by_nodes: seconds of a tree step by its nodes.
    """

    vanilla: float
    by_nodes: dict[int, float]

    @property
    def most(self) -> int:
        """The largest node count whose cost is known."""
        return max(self.by_nodes)

    def seconds(self, nodes: int) -> float:
        """Seconds of a tree step, interpolated; below the smallest measured count, those of it."""
        ladder = sorted(self.by_nodes)
        place = bisect_left(ladder, nodes)
        high = ladder[min(place, len(ladder) - 1)]
        low = ladder[place - 1] if 0 < place < len(ladder) else high
        share = (nodes - low) / (high - low) if high > low else 1.0
        return self.by_nodes[low] * (1 - share) + self.by_nodes[high] * share


@dataclass(frozen=True)
class Option:
    """A tree to choose from.

    Attributes:
        kind: dynamic, if its nodes are chosen at each step; or static.
        length: forecast acceptance length.
        seconds: what a step takes.
    """

    kind: str
    nodes: int
    length: float
    seconds: float

    @property
    def rate(self) -> float:
        """Forecast tokens per second."""
        return self.length / self.seconds


def fastest(options: Iterable[Option]) -> Option:
    """The option with the most tokens per second; the first of equals."""
    return max(options, key=lambda option: option.rate)


def options(
    accuracy: Frequencies,
    costs: Mapping[str, StepCost],
    gain: Callable[[int], float] = lambda _: 0.0,
    beside: float = 0.0,
) -> list[Option]:
    """List the best tree of every kind and node count whose steps were timed.

    Args:
        accuracy: how often the heads are right.
        costs: step costs by the kind of tree.
        gain: tokens per step that copies add to a tree of n nodes.
        beside: seconds that a step takes beside its measured cost.
    """
    lengths_of = {"static": static_lengths, "dynamic": dynamic_lengths}
    return [
        Option(kind, nodes, length + gain(nodes), cost.seconds(nodes) + beside)
        for kind, cost in costs.items()
        for nodes, length in lengths_of[kind](accuracy, cost.most).items()
    ]


def static_lengths(accuracy: Frequencies, most: int) -> dict[int, float]:
    """Forecast acceptance length of the best static tree of 2 to `most` nodes."""
    found = likeliest(accuracy.frequency, accuracy.widths, most - 1)
    lengths = accumulate((frequency for _, frequency in found), initial=1.0)
    return dict(islice(enumerate(lengths, 1), 1, None))


def dynamic_lengths(accuracy: Frequencies, most: int) -> dict[int, float]:
    """Forecast acceptance length of the dynamic tree of 2 to `most` nodes, if any was measured."""
    forecasts = {nodes: accuracy.forecast_dynamic(nodes) for nodes in range(2, most + 1)}
    return {nodes: length for nodes, length in forecasts.items() if length is not None}
