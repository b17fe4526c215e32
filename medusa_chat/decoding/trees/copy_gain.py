"""What copies add to the acceptance length of trees of every size, learned as the conversation goes. No torch.

Heads' guesses and a copied chain compete for a tree's places, so a larger tree may bring much more with copies than
without. A step shows it for all sizes at once: what followed is known, and so is the place of each of its tokens in the
order in which nodes are taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from itertools import takewhile
from math import inf, log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medusa_chat.decoding.draft.copies import Copied
    from medusa_chat.decoding.trees.tree import NodePath

PRIOR = 30  # steps without a gain that stand before the first
MEMORY = 300  # steps after which a step counts 1/e of a new one
ROUNDING = 1e-9  # sums of logarithms that differ by less are equal


class CopyGain:
    """Judges each step as if trees of every size had been verified, with the copies and without them."""

    def __init__(self) -> None:
        self._shares: Mapping[NodePath, float] = {}  # log p of each known path
        self._below: Mapping[
            NodePath, list[float]
        ] = {}  # of itself and the paths that it begins, negative, rising
        self._more: dict[int, float] = defaultdict(
            float
        )  # tokens that trees of at least so many nodes accept more
        self._steps, self._unit = (
            0.0,
            1.0,
        )  # a new step counts more than those before it: they fade at no cost

    def know(self, likeliest: Sequence[tuple[NodePath, float]]) -> None:
        """Take the heads' most frequent paths with their frequencies, most frequent first."""
        self._shares = {path: log(frequency) for path, frequency in likeliest if frequency > 0}
        below: dict[NodePath, list[float]] = defaultdict(list)
        for path, share in self._shares.items():
            for depth in range(len(path) + 1):
                below[path[:depth]].append(-share)
        self._below = below

    def add(
        self, guesses: Sequence[Sequence[int]], copied: Copied | None, followed: Sequence[int]
    ) -> None:
        """Count a step: guesses[k - 1] of head k, likeliest first; `followed` are the tokens behind the root, as many
        as heads or copies could have guessed. Nothing is counted before the heads' paths are known.
        """
        if not self._shares:
            return
        self._unit *= MEMORY / (MEMORY - 1)
        if self._unit > 1e6:
            self._more = defaultdict(
                float, {needed: value / self._unit for needed, value in self._more.items()}
            )
            self._steps, self._unit = self._steps / self._unit, 1.0
        self._steps += self._unit
        if copied is None:
            return
        path, shares = self._along(guesses, copied.tokens)
        chain = _joined(shares, copied.log_p)
        # What begins as the chain does is as likely as that beginning became.
        lifts = [0.0, *(joined - own for joined, own in zip(chain, shares, strict=False))]
        tail = chain[len(path) :]
        agreed = sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(copied.tokens, followed, strict=False)
            )
        )
        _, own = self._along(guesses, followed)
        for score in own:
            self._more[2 + self._above(score, (), [0.0])] -= self._unit
        for score in _joined(own, copied.log_p[:agreed]):
            copies = sum(each > score + ROUNDING for each in tail)
            self._more[2 + self._above(score, path, lifts) + copies] += self._unit

    def forget(self) -> None:
        """There are no copies from now on."""
        self._more.clear()
        self._steps = 0.0

    def of(self, nodes: int) -> float:
        """Tokens a step that copies add to a tree of so many nodes; the root counts as one."""
        more = sum(value for needed, value in self._more.items() if needed <= nodes)
        return more / (self._steps + PRIOR * self._unit)

    def _above(self, score: float, path: NodePath, lifts: Sequence[float]) -> int:
        """Guesses of the heads that are likelier than `score`, if those that share just the first n guesses with `path`
        have lifts[n] more.
        """
        count = 0
        for depth, lift in enumerate(lifts):
            limit = lift - score - ROUNDING
            count += bisect_left(self._below[path[:depth]], limit)
            if depth < len(path):
                count -= bisect_left(self._below[path[: depth + 1]], limit)
        return count

    def _along(
        self, guesses: Sequence[Sequence[int]], tokens: Sequence[int]
    ) -> tuple[NodePath, list[float]]:
        """The path of these tokens as far as the heads guess it, and its log p, depth by depth."""
        path: NodePath = ()
        for row, token in zip(guesses, tokens, strict=False):
            if token not in row or (*path, row.index(token)) not in self._shares:
                break
            path = (*path, row.index(token))
        return path, [self._shares[path[:depth]] for depth in range(1, len(path) + 1)]


def _joined(shares: Sequence[float], chain: Sequence[float]) -> list[float]:
    """Log p of a path, depth by depth, whose guesses are as likely as the surer of heads and copies says.

    shares: the heads' log p of the path as far as they guess it; chain: the copies' log p of each of its first tokens.
    """
    found, total, before = [], 0.0, 0.0
    for depth in range(max(len(shares), len(chain))):
        own = min(shares[depth] - before, 0.0) if depth < len(shares) else -inf
        before = shares[depth] if depth < len(shares) else before
        total += max(own, chain[depth] if depth < len(chain) else -inf)
        found.append(total)
    return found
