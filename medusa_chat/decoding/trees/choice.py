"""Which tree is fastest here: measured cost of a step by its nodes, combined with how often the heads are right."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING

from medusa_chat.config import Sampling
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.trees.accuracy import Accuracy, Frequencies, dynamic_tree, grow, likeliest
from medusa_chat.decoding.trees.tree import AnyTree, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from medusa_chat.decoding.draft.copies import Copied
    from medusa_chat.decoding.runner import Runner

LADDER = (
    8,
    16,
    4,
    32,
    64,
    2,
    24,
    12,
    48,
    6,
)  # node counts to time, what a slow model needs most first
TIMED_LENGTH = 256  # cached positions behind which steps are timed
REPEATS = 12
BUDGET = 1.5  # seconds after which no further step is timed
ENOUGH = 2  # node counts that are timed whatever it takes
# Seconds: quicker steps are taken twice, and the second counts. In a reply a step follows one of as many nodes, whose
# buffers and code are still in the caches; behind one of another number it may take a fourth more.
QUICK = 0.015
JUDGED = 4  # times that a count is timed before it may be left alone
HOPE = 1.15  # a count is timed on if it could be faster than the best so far with its cost this much overrated


@dataclass(frozen=True)
class StepCost:
    """Measured seconds of a step: of a vanilla one, and of a tree step by nodes."""

    vanilla: float
    by_nodes: dict[int, float]

    @property
    def most(self) -> int:
        """The largest node count whose cost is known."""
        return max(self.by_nodes)

    def seconds(self, nodes: int) -> float:
        """Of a tree step: interpolated between measured node counts, below the smallest as much as that."""
        ladder = sorted(self.by_nodes)
        place = bisect_left(ladder, nodes)
        high = ladder[min(place, len(ladder) - 1)]
        low = ladder[place - 1] if 0 < place < len(ladder) else high
        share = (nodes - low) / (high - low) if high > low else 1.0
        return self.by_nodes[low] * (1 - share) + self.by_nodes[high] * share

    def overhead(self, nodes: int) -> float:
        """Cost of a tree step relative to a vanilla step."""
        return self.seconds(nodes) / self.vanilla


@dataclass(frozen=True)
class Option:
    """A tree that could be used.

    Attributes:
        kind: how its nodes are chosen; static: by the heads' accuracies, the same nodes at every step.
        length: forecast acceptance length; seconds: measured cost of a step.
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
    """The option with the most tokens per second, of whatever kinds; of equals the first."""
    return max(options, key=lambda option: option.rate)


def no_gain(nodes: int) -> float:
    """What copies add to the acceptance length of a tree of so many nodes, where nobody knows of any."""
    return 0.0


def static_options(
    accuracy: Frequencies, cost: StepCost, gain: Callable[[int], float] = no_gain
) -> list[Option]:
    """The best static tree of every node count from 2 up to what was measured and the heads can fill."""
    found = likeliest(accuracy.frequency, accuracy.widths, cost.most - 1)
    lengths = list(accumulate((frequency for _, frequency in found), initial=1.0))
    return [
        Option("static", n, lengths[n - 1] + gain(n), cost.seconds(n))
        for n in range(2, len(lengths) + 1)
    ]


def dynamic_options(
    accuracy: Frequencies, cost: StepCost, gain: Callable[[int], float] = no_gain
) -> list[Option]:
    """The dynamic trees likewise; none where nobody measured what such trees bring."""
    lengths = {nodes: accuracy.forecast_dynamic(nodes) for nodes in range(2, cost.most + 1)}
    return [
        Option("dynamic", n, length + gain(n), cost.seconds(n))
        for n, length in lengths.items()
        if length is not None
    ]


def kinds(accuracy: Accuracy) -> dict[str, Callable[[int], AnyTree]]:
    """The kinds of trees worth timing, as what makes one of n nodes: dynamic ones where their acceptance is known."""
    found: dict[str, Callable[[int], AnyTree]] = {"static": lambda nodes: grow(accuracy, nodes)[0]}
    return found | {"dynamic": partial(dynamic_tree, accuracy)} if accuracy.dynamic else found


def options(
    accuracy: Frequencies, costs: Mapping[str, StepCost], gain: Callable[[int], float] = no_gain
) -> list[Option]:
    """All that there is to choose from, of every kind whose steps were timed."""
    by_kind = {"static": static_options, "dynamic": dynamic_options}
    return [
        option for kind, cost in costs.items() for option in by_kind[kind](accuracy, cost, gain)
    ]


def measure(
    runner: Runner,
    accuracy: Accuracy,
    *,
    tree_of: Callable[[int], AnyTree] | None = None,
    copied: Copied | None = None,
    length: int = TIMED_LENGTH,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCost:
    """Time steps over a blank text; the runner's cache must be empty and is left so.

    The rounds go over the whole ladder in turn, so that a slow moment of the machine does not fall on one count. A
    slow model gets fewer rounds, a very slow one fewer counts, and a count that can't win for its cost is left alone.

    Args:
        tree_of: the tree that is timed at a node count; by default the best static one.
        copied: what stands for the copies that seek a place among the guesses; None without copies.
        length: cached positions behind which steps are timed, if there are as many.
        budget: seconds; infinite for every count of the ladder, REPEATS times.
    """
    forecast = grow(accuracy, max(LADDER))[1]
    grown = tree_of or kinds(accuracy)["static"]
    ladder = list(dict.fromkeys(min(nodes, len(forecast)) for nodes in LADDER))
    times = _Times(forecast, {1: [], **{nodes: [] for nodes in ladder}})
    trees: dict[int, AnyTree] = {1: Tree(), **{nodes: grown(nodes) for nodes in ladder}}
    length = timed_length(runner, length)
    rule = make_rule(Sampling())

    def step_seconds(nodes: int) -> float:
        runner.cache.rewind(length)
        before = clock()
        runner.step(0, trees[nodes], rule, copied if nodes > 1 else None)
        return clock() - before

    started = clock()
    try:
        runner.prefill([0], rule)
        runner.cache.fill(length)
        for turn in range(REPEATS + 1):
            # The first vanilla step pays for more than itself, so a slow model takes two at once.
            for nodes in (*([1] if turn == 0 else []), 1, *ladder):
                if clock() - started > budget and times.enough(turn):
                    return times.cost()
                if budget == inf or times.hopeful(nodes):
                    seconds = step_seconds(nodes)
                    times.seconds[nodes].append(step_seconds(nodes) if seconds < QUICK else seconds)
        return times.cost()
    finally:
        runner.cache.rewind(0)


def timed_length(runner: Runner, length: int = TIMED_LENGTH) -> int:
    """Cached positions behind which `measure` times steps."""
    return min(length, runner.backbone.context - 1, runner.cache.capacity - max(LADDER))


@dataclass(frozen=True)
class _Times:
    """What was timed so far: seconds by nodes, 1 for vanilla; forecast[n - 1]: acceptance length with n nodes."""

    forecast: list[float]
    seconds: dict[int, list[float]]

    def enough(self, turn: int) -> bool:
        """Whether the budget may end it: after two rounds, and within them if the model is too slow for two."""
        if 2 * len(self.seconds) * _typical(self.seconds[1]) < BUDGET:
            return turn > 1  # what took so long was preparation, such as graphs that were captured
        timed = sum(nodes > 1 and bool(seconds) for nodes, seconds in self.seconds.items())
        return timed >= min(ENOUGH, len(self.seconds) - 1)

    def hopeful(self, nodes: int) -> bool:
        """Whether a tree of so many nodes may be the fastest: it costs at least as much as any smaller one."""
        known = {
            n: _typical(timed)
            for n, timed in self.seconds.items()
            if n > 1 and len(timed) >= JUDGED
        }
        floor = max((seconds for n, seconds in known.items() if n <= nodes), default=0.0)
        best = max((self.forecast[n - 1] / seconds for n, seconds in known.items()), default=0.0)
        return nodes == 1 or HOPE * self.forecast[nodes - 1] >= best * floor

    def cost(self) -> StepCost:
        timed = {
            nodes: _typical(seconds) for nodes, seconds in sorted(self.seconds.items()) if seconds
        }
        vanilla = timed.pop(1)
        return StepCost(vanilla, dict(zip(timed, rising(list(timed.values())), strict=True)))


def _typical(seconds: list[float]) -> float:
    """The lower quartile: a first step prepares, and what else the machine does only ever adds to one."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


def rising(values: list[float]) -> list[float]:
    """The rising sequence nearest to `values` (least squares, by pooling adjacent violators): a step of more nodes
    costs no less, and one lucky timing does not decide.
    """
    pools: list[tuple[float, int]] = []  # mean, members
    for value in values:
        mean, members = value, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, members = (mean * members + other * more) / (members + more), members + more
        pools.append((mean, members))
    return [mean for mean, members in pools for _ in range(members)]
