"""Tokens that copies add to the acceptance length of trees of every size. No torch here.

Heads' guesses and a copied chain compete for the nodes of a tree, so a larger tree may gain much
more from copies than a small one. One step shows the gain for all sizes at once: the tokens that
followed are known, and so is the place of each in the order in which a tree takes its nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from math import inf, log
from typing import TYPE_CHECKING

from medusa_chat.decoding.trees.fading import FadingCounter
from medusa_chat.text import common_prefix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medusa_chat.decoding.draft.copies import Copied
    from medusa_chat.decoding.draft.guesses import Guesses
    from medusa_chat.decoding.trees.tree import NodePath

GAIN_PRIOR = 10  # compared steps without a gain that count before the first one
GAIN_MEMORY = 100  # compared steps after which one counts 1/e of a new one
ROUNDING = 1e-9  # sums of logarithms that differ by less are equal


class CopyGain:
    """Judge each step as if trees of every size had been verified, with copies and without."""

    def __init__(self) -> None:
        self._log_p: Mapping[NodePath, float] = {}
        # For each path, -log p of itself and of the paths that it begins, in rising order.
        self._below: Mapping[NodePath, list[float]] = {}
        # Nodes that a tree needs at least -> tokens that it accepts more per step.
        self._gains: FadingCounter[int] = FadingCounter(GAIN_MEMORY, GAIN_PRIOR)
        self._rates: dict[int, float] | None = None  # of the gains, until a step changes them

    def set_paths(self, likeliest: Sequence[tuple[NodePath, float]]) -> None:
        """Set the heads' most frequent paths with their frequencies, most frequent first."""
        self._log_p = {path: log(frequency) for path, frequency in likeliest if frequency > 0}
        below: dict[NodePath, list[float]] = defaultdict(list)
        for path, log_p in self._log_p.items():
            for depth in range(len(path) + 1):
                below[path[:depth]].append(-log_p)
        self._below = below

    def add(self, guesses: Guesses, copied: Copied | None, followed: Sequence[int]) -> None:
        """Count a step; without effect until the heads' paths are set.

        Args:
            guesses: of the heads behind the root.
            copied: the chain that was copied.
            followed: the tokens after the root, as many as heads or copies could have guessed.
        """
        if not self._log_p:
            return
        self._gains.begin_step()
        self._rates = None
        if copied is None:
            return
        path, log_p = self._along(guesses, copied.tokens)
        chain = _joined(log_p, copied.log_p)
        # A path that begins like the chain becomes likelier by as much as that beginning.
        lifts = [0.0, *(joined - own for joined, own in zip(chain, log_p, strict=False))]
        only_copied = chain[len(path) :]
        agreed = common_prefix(copied.tokens, followed)
        _, own = self._along(guesses, followed)
        for score in own:
            self._gains.add(2 + self._likelier(score, (), [0.0]), -1.0)
        for score in _joined(own, copied.log_p[:agreed]):
            copies = sum(each > score + ROUNDING for each in only_copied)
            self._gains.add(2 + self._likelier(score, path, lifts) + copies)

    def forget(self) -> None:
        """Forget all steps: nothing is copied from now on."""
        self._gains.clear()
        self._rates = None

    def of(self, nodes: int) -> float:
        """Tokens per step that copies add to a tree of `nodes` nodes, the root included."""
        if self._rates is None:
            self._rates = {needed: self._gains.rate(needed) for needed in self._gains}
        return sum(rate for needed, rate in self._rates.items() if needed <= nodes)

    def _likelier(self, score: float, path: NodePath, lifts: Sequence[float]) -> int:
        """Count the heads' guesses that are likelier than `score`.

        A guess that shares exactly its first n guesses with `path` is lifts[n] likelier.
        """
        count = 0
        for depth, lift in enumerate(lifts):
            limit = lift - score - ROUNDING
            count += bisect_left(self._below[path[:depth]], limit)
            if depth < len(path):
                count -= bisect_left(self._below[path[: depth + 1]], limit)
        return count

    def _along(self, guesses: Guesses, tokens: Sequence[int]) -> tuple[NodePath, list[float]]:
        """Follow tokens as far as the heads guess them: the path, and its log p at each depth."""
        path: NodePath = ()
        log_p = []
        for rank in guesses.ranks(tokens):
            if (*path, rank) not in self._log_p:
                break
            path = (*path, rank)
            log_p.append(self._log_p[path])
        return path, log_p


def _joined(heads: Sequence[float], chain: Sequence[float]) -> list[float]:
    """Log p of a path at each depth, where the surer of heads and copies counts for each guess.

    Args:
        heads: the heads' log p of the path, as far as they guess it.
        chain: the copies' log p of each of the path's first tokens.
    """
    joined: list[float] = []
    total = 0.0
    before = 0.0
    for depth in range(max(len(heads), len(chain))):
        surest = -inf
        if depth < len(heads):
            surest = min(heads[depth] - before, 0.0)
            before = heads[depth]
        if depth < len(chain):
            surest = max(surest, chain[depth])
        total += surest
        joined.append(total)
    return joined
