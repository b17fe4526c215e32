"""Which tree is fastest here: measured cost of a step by its nodes, combined with measured head accuracies."""

from __future__ import annotations

import heapq
import json
import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from medusa_chat.config import Sampling, UserError
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.tree import NodePath, Tree

LADDER = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TIMED_LENGTH = 256  # cached positions behind which steps are timed
REPEATS = 12
# Top-1 to top-5 accuracy of the published Vicuna-7B heads (FasterDecoding/Medusa, assets/medusa_acc.csv), for heads
# whose own accuracy nobody has measured.
PUBLISHED = (
    (0.560, 0.672, 0.727, 0.760, 0.780), (0.316, 0.424, 0.485, 0.528, 0.563), (0.201, 0.288, 0.348, 0.383, 0.417),
    (0.147, 0.225, 0.274, 0.311, 0.340), (0.118, 0.187, 0.235, 0.272, 0.300),
)  # fmt: skip

Accuracy = tuple[tuple[float, ...], ...]  # accuracy[k][i]: the true token is among head k + 1's likeliest i + 1


def read_accuracy(file: Path) -> Accuracy | None:
    """Measured accuracies beside the heads, as `medusa-chat calibrate` writes them; None if there are none."""
    if not file.is_file():
        return None
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["accuracy"]
        accuracy = tuple(tuple(float(value) for value in row) for row in rows)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read the head accuracies {file}: {error!r}; run medusa-chat calibrate again") from None
    in_range = all(0 <= value <= 1 for row in accuracy for value in row)
    if not accuracy or not in_range or not all(row and sorted(row) == list(row) for row in accuracy):
        raise UserError(f"{file}: accuracies must be rows of rising fractions; run medusa-chat calibrate again")
    return accuracy


def grow(accuracy: Accuracy, nodes: int) -> tuple[Tree, list[float]]:
    """The best tree of up to `nodes` nodes (root included), grown greedily as in the paper (section 2.3.3).

    Returns:
        the tree, and the forecast acceptance length of each of its stages: forecast[n - 1] with n nodes. A node
        is right with the product of the accuracies along its path, heads taken as independent.
    """
    gains = [[row[0], *(b - a for a, b in pairwise(row))] for row in accuracy]
    # Every rank of a new node's children is open at once: measured gains need not fall from rank to rank.
    frontier: list[tuple[float, NodePath]] = [(-gain, (rank,)) for rank, gain in enumerate(gains[0])]
    heapq.heapify(frontier)
    paths: list[NodePath] = []
    forecast = [1.0]
    while frontier and len(paths) + 1 < nodes:
        negative, path = heapq.heappop(frontier)
        paths.append(path)
        forecast.append(forecast[-1] - negative)
        for rank, gain in enumerate(gains[len(path)] if len(path) < len(gains) else ()):
            heapq.heappush(frontier, (negative * gain, (*path, rank)))
    return Tree.of(paths, "auto"), forecast


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


def measure(runner: Runner, accuracy: Accuracy) -> StepCost:
    """Time steps over a blank text; the runner's cache must be empty and is left so.

    The rounds go over the whole ladder in turn, so that a slow moment of the machine does not fall on one count.
    """
    length = min(TIMED_LENGTH, runner.backbone.context - 1, runner.cache.capacity - max(LADDER))
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
