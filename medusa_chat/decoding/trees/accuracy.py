"""How often the heads are right: figures of `medusa-chat calibrate` and their file. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import inf, log
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.decoding.trees.tree import AnyTree, NodePath, Tree
from medusa_chat.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MEANING = (
    "accuracy[k][i]: the model's own greedy token is among the i + 1 likeliest guesses of"
    " head k + 1; paths: every guess along a path of head ranks (from 0) is right in this share of"
    " the steps; calibration[k]: scale and shift that turn head k + 1's log p into that of its"
    " guess being right; dynamic: acceptance length by nodes of trees chosen at each step;"
    " coupling[k]: weights of head k + 1's tempered log p and of the noise of a draw; exact: the"
    " same figures for mode exact, whose guesses are ranked with that noise"
)


class Frequencies(ABC):
    """How often every guess along a path is right: the figures that a tree is grown from."""

    @property
    @abstractmethod
    def widths(self) -> list[int]:
        """Ranked guesses of each head."""

    @abstractmethod
    def frequency(self, path: NodePath) -> float:
        """Share of the steps in which every guess along the path is right.

        It is never larger than that of the path's prefix.
        """

    @abstractmethod
    def forecast_dynamic(self, nodes: int) -> float | None:
        """Acceptance length of the dynamic tree of `nodes` nodes; None if none was measured."""

    def forecast_static(self, tree: Tree) -> float:
        """Acceptance length of a fixed tree: each node adds the frequency of its path."""
        return sum(map(self.frequency, tree.paths))

    def forecast(self, tree: AnyTree) -> float | None:
        """Acceptance length without copies; None for a dynamic tree if none was measured."""
        if isinstance(tree, Tree):
            return self.forecast_static(tree)
        return self.forecast_dynamic(len(tree))


@dataclass(frozen=True)
class Accuracy(Frequencies):
    """How often the heads guess the tokens of the model's own greedy decoding.

    Attributes:
        top: top[k][i]: the true token is among the i + 1 likeliest guesses of head k + 1.
        paths: share of the steps in which every guess along a path is right, for the most frequent
            paths and all their prefixes; empty if heads were measured one by one only.
        calibration: calibration[k]: scale and shift that turn head k + 1's log p into that of its
            guess being right after right guesses: min(0, scale * log p + shift). Empty: unchanged.
        dynamic: acceptance length by nodes of trees that are chosen at each step.
        coupling: coupling[k]: weights of head k + 1's tempered log p and of the noise in the score
            of a guess that is coupled to a draw. Empty: 1 and 1.
        exact: the same figures for guesses that are coupled to that noise, as mode exact ranks
            them; None if they were not measured.
    """

    top: tuple[tuple[float, ...], ...]
    paths: Mapping[NodePath, float] = field(default_factory=dict)
    calibration: tuple[tuple[float, float], ...] = ()
    dynamic: Mapping[int, float] = field(default_factory=dict)
    coupling: tuple[tuple[float, float], ...] = ()
    exact: Accuracy | None = None

    def of_guesses(self, *, coupled: bool) -> Accuracy:
        """The figures of guesses that are coupled to the noise of the draws, or are not.

        Coupled ones that were not measured are taken to be right as often.
        """
        if not coupled:
            return self
        return self.exact or Accuracy(self.top, self.paths)

    @property
    def widths(self) -> list[int]:
        """Ranked guesses of each head."""
        return [len(row) for row in self.top]

    @cached_property
    def gains(self) -> list[list[float]]:
        """gains[k][i]: the true token is head k + 1's guess of rank i, counted from 0."""
        return [[row[0], *(b - a for a, b in pairwise(row))] for row in self.top]

    def pruned(self, heads: int, width: int) -> Accuracy:
        """The figures of the first `heads` heads and of `width` guesses of each."""
        paths = {
            path: frequency
            for path, frequency in self.paths.items()
            if len(path) <= heads and max(path, default=0) < width
        }
        return Accuracy(
            tuple(row[:width] for row in self.top[:heads]),
            paths,
            self.calibration[:heads],
            self.dynamic if heads >= len(self.top) else {},
            self.coupling[:heads],
            self.exact and self.exact.pruned(heads, width),
        )

    def frequency(self, path: NodePath) -> float:
        """Share of the steps in which every guess along the path is right.

        A path that was not measured has its prefix's share times the chance of its last guess, as
        if heads were independent (paper, section 2.3.3), but no more than the rarest measured one.
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

    def coupling_of(self, head: int) -> tuple[float, float]:
        """Weights of a head's log p and of the noise."""
        return self.coupling[head - 1] if head <= len(self.coupling) else (1.0, 1.0)

    def forecast_dynamic(self, nodes: int) -> float | None:
        """Acceptance length as measured, interpolated over the logarithm of the nodes."""
        if not self.dynamic:
            return None
        known = [(1, 1.0), *sorted(self.dynamic.items())]
        for (fewer, short), (more, long) in pairwise(known):
            if nodes <= more:
                return short + (long - short) * log(nodes / fewer) / log(more / fewer)
        return known[-1][1]


# Top-1 to top-5 accuracy of the published Vicuna-7B heads (FasterDecoding/Medusa,
# assets/medusa_acc.csv), for heads that are not calibrated.
PUBLISHED = Accuracy(
    (
        (0.560, 0.672, 0.727, 0.760, 0.780),
        (0.316, 0.424, 0.485, 0.528, 0.563),
        (0.201, 0.288, 0.348, 0.383, 0.417),
        (0.147, 0.225, 0.274, 0.311, 0.340),
        (0.118, 0.187, 0.235, 0.272, 0.300),
    )
)


def write_accuracy(accuracy: Accuracy, file: Path, source: str) -> None:
    """Write a file for `read_accuracy`, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    document = {"source": source, "meaning": MEANING, **_figures(accuracy)}
    if accuracy.exact is not None:
        document["exact"] = _figures(accuracy.exact)
    write_json(file, document, indent=None)


def _figures(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "accuracy": [[round(value, 5) for value in row] for row in accuracy.top],
        "paths": [[list(path), round(share, 5)] for path, share in accuracy.paths.items()],
        "calibration": [list(line) for line in accuracy.calibration],
        "dynamic": [[nodes, round(length, 5)] for nodes, length in accuracy.dynamic.items()],
        "coupling": [list(weights) for weights in accuracy.coupling],
    }


def read_accuracy(file: Path) -> Accuracy | None:
    """Read a file of `write_accuracy`; None if there is no such file.

    Files of older versions have accuracies alone.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    if not file.is_file():
        return None
    try:
        document = read_json(file)
        accuracy = _read_figures(document)
        if "exact" not in document:
            return accuracy
        return replace(accuracy, exact=_read_figures(document["exact"]))
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"cannot read the head accuracies {file}: {error!r}; run medusa-chat calibrate again"
        ) from None


def _read_figures(document: Any) -> Accuracy:
    top = _top(document["accuracy"])
    return Accuracy(
        top,
        _paths(document.get("paths", []), top),
        tuple(_calibration(*line) for line in document.get("calibration", [])),
        dict(_dynamic(*pair) for pair in document.get("dynamic", [])),
        tuple(_coupling(*weights) for weights in document.get("coupling", [])),
    )


def _top(rows: Any) -> tuple[tuple[float, ...], ...]:
    """Check accuracies; raises ValueError or TypeError if they are not rising fractions."""
    top = tuple(tuple(float(value) for value in row) for row in rows)
    for row in top:
        in_range = all(0 <= value <= 1 for value in row)
        if not row or not in_range or sorted(row) != list(row):
            raise ValueError(f"accuracies {list(row)} are not rising fractions")
    if not top:
        raise ValueError("no accuracies")
    return top


def _calibration(scale: Any, shift: Any) -> tuple[float, float]:
    """Check a head's calibration; raises ValueError or TypeError."""
    if not (0 < float(scale) < inf and -inf < float(shift) < inf):
        raise ValueError(f"calibration {scale}, {shift}")
    return float(scale), float(shift)


def _coupling(log_p: Any, noise: Any) -> tuple[float, float]:
    """Check a head's weights; raises ValueError or TypeError."""
    if not (0 < float(log_p) < inf and 0 <= float(noise) < inf):
        raise ValueError(f"coupling {log_p}, {noise}")
    return float(log_p), float(noise)


def _dynamic(nodes: Any, length: Any) -> tuple[int, float]:
    """Check an acceptance length by nodes; raises ValueError or TypeError."""
    if type(nodes) is not int or nodes < 2 or not 1 <= float(length) <= nodes:
        raise ValueError(f"acceptance length {length} of {nodes} nodes")
    return nodes, float(length)


def _paths(listed: Any, top: tuple[tuple[float, ...], ...]) -> dict[NodePath, float]:
    """Check paths, [[0, 2], 0.13] each; raises ValueError or TypeError."""
    paths = {tuple(path): float(frequency) for path, frequency in listed}
    for path, frequency in paths.items():
        ranks = zip(path, top, strict=False)
        ranked = all(type(rank) is int and 0 <= rank < len(row) for rank, row in ranks)
        prefix = paths.get(path[:-1], 0.0) if len(path) > 1 else 1.0
        if not 0 < len(path) <= len(top) or not ranked or not 0 <= frequency <= prefix:
            raise ValueError(f"path {list(path)} of frequency {frequency:g}")
    return paths
