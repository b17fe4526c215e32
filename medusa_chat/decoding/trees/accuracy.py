"""How often the heads are right, as `medusa-chat calibrate` measures it, and the best tree that follows. No torch."""

from __future__ import annotations

import heapq
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf, log
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, NodePath, Tree, named_tree
from medusa_chat.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

MEANING = (
    "accuracy[k][i]: the model's own greedy token is among the likeliest i + 1 guesses of head k + 1; paths: every"
    " guess along a path of head ranks (from 0) is right in this share of the steps; calibration[k]: scale and"
    " shift that make head k + 1's log p that of its guess being right; dynamic: acceptance length by nodes of trees"
    " chosen by these"
)


class Frequencies(ABC):
    """How often every guess along a path is right: what a tree is grown from."""

    @property
    @abstractmethod
    def widths(self) -> list[int]:
        """How many guesses of each head were ranked."""

    @abstractmethod
    def frequency(self, path: NodePath) -> float:
        """Share of the steps in which every guess along a path is right; never more than that of its prefix."""

    @abstractmethod
    def forecast_dynamic(self, nodes: int) -> float | None:
        """The acceptance length of the dynamic tree of `nodes`; None where nobody measured any."""

    def forecast_static(self, tree: Tree) -> float:
        """The acceptance length of a fixed tree: each node adds a token as often as its path is right."""
        return sum(map(self.frequency, tree.paths))

    def forecast(self, tree: AnyTree) -> float | None:
        """The acceptance length that a tree should have without copies; None for a dynamic one that nobody measured."""
        return (
            self.forecast_static(tree)
            if isinstance(tree, Tree)
            else self.forecast_dynamic(len(tree))
        )


@dataclass(frozen=True)
class Accuracy(Frequencies):
    """How often the heads guess what the model's own greedy decoding says.

    Attributes:
        top: top[k][i]: the true token is among head k + 1's likeliest i + 1.
        paths: share of the steps in which every guess along a path is right, for the most frequent paths, each
            with its prefixes; empty where heads were measured one by one only.
        calibration: calibration[k]: scale and shift with which head k + 1's own log p become those of its guesses
            being right where the guesses before them are: min(0, scale * log p + shift). Empty: as the head says.
        dynamic: acceptance length by nodes, of trees that are chosen step by step; empty where nobody measured it.
    """

    top: tuple[tuple[float, ...], ...]
    paths: Mapping[NodePath, float] = field(default_factory=dict)
    calibration: tuple[tuple[float, float], ...] = ()
    dynamic: Mapping[int, float] = field(default_factory=dict)

    @property
    def widths(self) -> list[int]:
        return [len(row) for row in self.top]

    @cached_property
    def gains(self) -> list[list[float]]:
        """gains[k][i]: the true token is head k + 1's guess of rank i, counted from 0."""
        return [[row[0], *(b - a for a, b in pairwise(row))] for row in self.top]

    def pruned(self, heads: int, width: int) -> Accuracy:
        """What concerns the first `heads` heads and `width` guesses of each."""
        kept = {
            p: share
            for p, share in self.paths.items()
            if len(p) <= heads and all(rank < width for rank in p)
        }
        dynamic = self.dynamic if heads >= len(self.top) else {}
        return Accuracy(
            tuple(row[:width] for row in self.top[:heads]), kept, self.calibration[:heads], dynamic
        )

    def frequency(self, path: NodePath) -> float:
        """As measured. Where it was not, it is the prefix's share times the chance of the last guess, as if heads were
        independent (paper, section 2.3.3), but no more than the rarest path that was.
        """
        if not path:
            return 1.0
        if path in self.paths:
            return self.paths[path]
        *prefix, rank = path
        gains = self.gains[len(prefix)] if len(prefix) < len(self.gains) else []
        chance = gains[rank] if rank < len(gains) else 0.0
        return min(self.frequency(tuple(prefix)) * chance, self._rarest)

    @cached_property
    def _rarest(self) -> float:
        return min(self.paths.values(), default=1.0)

    def calibration_of(self, head: int) -> tuple[float, float]:
        """Scale and shift of a head's log p."""
        return self.calibration[head - 1] if head <= len(self.calibration) else (1.0, 0.0)

    def forecast_dynamic(self, nodes: int) -> float | None:
        """As measured; between measured counts by their logarithms."""
        if not self.dynamic:
            return None
        known = [(1, 1.0), *sorted(self.dynamic.items())]
        for (fewer, short), (more, long) in pairwise(known):
            if nodes <= more:
                return short + (long - short) * log(nodes / fewer) / log(more / fewer)
        return known[-1][1]


# Top-1 to top-5 accuracy of the published Vicuna-7B heads (FasterDecoding/Medusa, assets/medusa_acc.csv), for heads
# whose own accuracy nobody has measured.
PUBLISHED = Accuracy(
    (
        (0.560, 0.672, 0.727, 0.760, 0.780),
        (0.316, 0.424, 0.485, 0.528, 0.563),
        (0.201, 0.288, 0.348, 0.383, 0.417),
        (0.147, 0.225, 0.274, 0.311, 0.340),
        (0.118, 0.187, 0.235, 0.272, 0.300),
    )
)


def likeliest(
    frequency: Callable[[NodePath], float], widths: Sequence[int], count: int
) -> list[tuple[NodePath, float]]:
    """The `count` most frequent paths with their frequencies, most frequent first; widths[k]: ranks of head k + 1.

    No path may be more frequent than its prefix. So the paths form a tree, and no tree of as many has a larger sum.
    """
    found: list[tuple[NodePath, float]] = []
    frontier: list[tuple[float, NodePath]] = []
    path: NodePath = ()
    while len(found) < count:
        # Every rank of a node's children is open at once: frequencies need not fall from rank to rank.
        for rank in range(widths[len(path)] if len(path) < len(widths) else 0):
            heapq.heappush(frontier, (-frequency((*path, rank)), (*path, rank)))
        if not frontier:
            break
        negative, path = heapq.heappop(frontier)
        found.append((path, -negative))
    return found


def grow(accuracy: Frequencies, nodes: int) -> tuple[Tree, list[float]]:
    """The best tree of up to `nodes` nodes (root included), grown greedily as in the paper (section 2.3.3).

    Returns:
        the tree, and the forecast acceptance length of each of its stages: forecast[n - 1] with n nodes.
    """
    found = likeliest(accuracy.frequency, accuracy.widths, nodes - 1)
    forecast = list(accumulate((frequency for _, frequency in found), initial=1.0))
    return Tree.of((path for path, _ in found), "auto"), forecast


SUPERSET = 256  # paths that a dynamic tree is chosen from


def dynamic_tree(accuracy: Frequencies, nodes: int) -> DynamicTree:
    """The tree of `nodes` nodes that is chosen at each step from the SUPERSET most frequent paths, or of all it has."""
    superset = grow(accuracy, SUPERSET)[0]
    return DynamicTree(superset, min(nodes, len(superset)))


def shaped_tree(name: str, accuracy: Accuracy) -> AnyTree:
    """The tree of a name: dynamic-N, static-N (the best fixed tree of N nodes), or what `named_tree` knows."""
    kind, _, count = name.partition("-")
    if kind not in ("dynamic", "static") or not count.isdecimal():
        return named_tree(name)
    if not 1 < int(count) <= SUPERSET:
        raise UserError(f"{kind}-N has 2 to {SUPERSET} nodes, not {count}")
    if kind == "dynamic":
        return dynamic_tree(accuracy, int(count))
    return Tree(grow(accuracy, int(count))[0].paths, name)


def write_accuracy(accuracy: Accuracy, file: Path, source: str) -> None:
    """Write what was measured where `read_accuracy` finds it, whole or not at all; raises OSError."""
    rows = [[round(value, 5) for value in row] for row in accuracy.top]
    paths = [[list(path), round(frequency, 5)] for path, frequency in accuracy.paths.items()]
    document = {"source": source, "meaning": MEANING, "accuracy": rows, "paths": paths}
    document |= {"calibration": [list(line) for line in accuracy.calibration]}
    document |= {
        "dynamic": [[nodes, round(length, 5)] for nodes, length in accuracy.dynamic.items()]
    }
    write_text(file, json.dumps(document) + "\n")


def read_accuracy(file: Path) -> Accuracy | None:
    """What `medusa-chat calibrate` measured, from beside the heads; None if there is no such file.

    Raises:
        UserError: the file cannot be read or is damaged. One without paths or calibration is good: older versions
            wrote none.
    """
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        top = tuple(tuple(float(value) for value in row) for row in document["accuracy"])
        paths = _paths(document.get("paths", []), top)
        calibration = tuple(_line(*line) for line in document.get("calibration", []))
        dynamic = dict(_dynamic(*pair) for pair in document.get("dynamic", []))
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"cannot read the head accuracies {file}: {error!r}; run medusa-chat calibrate again"
        ) from None
    in_range = all(0 <= value <= 1 for row in top for value in row)
    if not top or not in_range or not all(row and sorted(row) == list(row) for row in top):
        raise UserError(
            f"{file}: accuracies must be rows of rising fractions; run medusa-chat calibrate again"
        )
    return Accuracy(top, paths, calibration, dynamic)


def _line(scale: Any, shift: Any) -> tuple[float, float]:
    """A head's calibration; raises ValueError for one that cannot be."""
    if not (0 < float(scale) < inf and -inf < float(shift) < inf):
        raise ValueError(f"calibration {scale}, {shift}")
    return float(scale), float(shift)


def _dynamic(nodes: Any, length: Any) -> tuple[int, float]:
    """An acceptance length by nodes; raises ValueError for one that cannot be."""
    if type(nodes) is not int or nodes < 2 or not 1 <= float(length) <= nodes:
        raise ValueError(f"acceptance length {length} of {nodes} nodes")
    return nodes, float(length)


def _paths(listed: Any, top: tuple[tuple[float, ...], ...]) -> dict[NodePath, float]:
    """Paths as the file has them, [[0, 2], 0.13] each; raises ValueError or TypeError for what no count can give."""
    paths = {tuple(path): float(frequency) for path, frequency in listed}
    for path, frequency in paths.items():
        ranked = all(
            type(rank) is int and 0 <= rank < len(row) for rank, row in zip(path, top, strict=False)
        )
        prefix = paths.get(path[:-1], 0.0) if len(path) > 1 else 1.0
        if not 0 < len(path) <= len(top) or not ranked or not 0 <= frequency <= prefix:
            raise ValueError(f"path {list(path)} of frequency {frequency:g}")
    return paths
