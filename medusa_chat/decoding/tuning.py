"""Which tree is fastest here: measured cost of a step by its nodes, combined with measured head accuracies."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass

from medusa_chat.config import Sampling
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.accuracy import Accuracy, grow
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.tree import Tree

LADDER = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TIMED_LENGTH = 256  # cached positions behind which steps are timed
REPEATS = 12


@dataclass(frozen=True)
class StepCost:
    """Measured seconds of a step: of a vanilla one, and of a tree step by nodes."""

    vanilla: float
    by_nodes: dict[int, float]

    def overhead(self, nodes: int) -> float:
        """Cost of a tree step relative to a vanilla step, interpolated between measured node counts."""
        if nodes in self.by_nodes:
            return self.by_nodes[nodes] / self.vanilla
        ladder = sorted(self.by_nodes)
        place = min(max(bisect_left(ladder, nodes), 1), len(ladder) - 1)
        low, high = ladder[place - 1], ladder[place]
        share = (nodes - low) / (high - low)
        return (self.by_nodes[low] * (1 - share) + self.by_nodes[high] * share) / self.vanilla


def measure(runner: Runner, accuracy: Accuracy, length: int = TIMED_LENGTH) -> StepCost:
    """Time steps over a blank text of `length` tokens; the runner's cache must be empty and is left so.

    The rounds go over the whole ladder in turn, so that a slow moment of the machine does not fall on one count.
    """
    length = min(length, runner.backbone.context - 1, runner.cache.capacity - max(LADDER))
    trees = [Tree(), *(grow(accuracy, nodes)[0] for nodes in LADDER)]
    times: dict[Tree, list[float]] = {tree: [] for tree in trees}
    rule = make_rule(Sampling())
    try:
        runner.prefill([0] * length, rule)
        for _ in range(REPEATS + 1):
            for tree, seconds in times.items():
                runner.cache.rewind(length)
                started = time.perf_counter()
                runner.step(0, tree, rule)
                seconds.append(time.perf_counter() - started)
    finally:
        runner.cache.rewind(0)
    # The lower quartile: what else the machine does only ever adds to a step.
    cost = {len(tree): sorted(seconds[1:])[(len(seconds) - 1) // 4] for tree, seconds in times.items()}
    return StepCost(cost.pop(1), cost)


def fastest(accuracy: Accuracy, cost: StepCost) -> tuple[Tree, float, float]:
    """The tree with the most tokens per second; also its forecast acceptance length and speedup."""
    whole, forecast = grow(accuracy, max(cost.by_nodes))
    speedups = {nodes: forecast[nodes - 1] / cost.overhead(nodes) for nodes in range(2, len(whole) + 1)}
    nodes = max(speedups, key=lambda n: speedups[n])
    return grow(accuracy, nodes)[0], forecast[nodes - 1], speedups[nodes]
