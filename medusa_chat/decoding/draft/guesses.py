"""Guesses: the heads' likeliest tokens behind one root, as the host reads them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

MISSED = -1  # rank of a token that is not among a head's guesses


@dataclass(frozen=True)
class Guesses:
    """The likeliest tokens of each head behind one root.

    Attributes:
        rows: rows[k - 1] of head k, likeliest first.
    """

    rows: list[list[int]]

    def ranks(self, followed: Sequence[int]) -> list[int]:
        """Rank tokens that follow the root among the guesses of heads 1, 2, ...

        A token's rank is the one that it has if those before it are right.
        """
        pairs = zip(self.rows, followed, strict=False)
        return [row.index(token) if token in row else MISSED for row, token in pairs]


@dataclass(frozen=True, eq=False)
class HostBias:
    """The parent bias of heads on the host (model.parent_bias).

    Attributes:
        first: float32 [P, rank].
        second: float32 [N, rank].
        rows: [V], the index of each token among the N that the heads rank, or N.
    """

    first: np.ndarray
    second: np.ndarray
    rows: np.ndarray

    def of(self, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Bias of tokens [k, c] by their parents [k]: [k, c]."""
        second = self.second[self.rows[tokens]]
        bias: np.ndarray = (second @ self.first[self.rows[parents]][..., None])[..., 0]
        return bias


@dataclass(frozen=True)
class ScoredGuesses(Guesses):
    """Guesses whose order is not the heads' own, or depends on the token before them.

    Attributes:
        root: the token that they follow.
        scores: scores[k - 1] of head k's guesses, by which they are ranked.
        bias: is added to the scores, by a guess and its parent; None without.
    """

    root: int
    scores: list[list[float]]
    bias: HostBias | None

    def ranks(self, followed: Sequence[int]) -> list[int]:
        """Rank tokens as `Guesses.ranks` does, each behind the token before it."""
        wanted = np.array(followed[: len(self.rows)])
        count = len(wanted)
        if not count:
            return []
        tokens = np.array(self.rows[:count])
        scores = np.array(self.scores[:count], dtype=np.float32)
        if self.bias is not None:
            scores = scores + self.bias.of(np.array([self.root, *followed])[:count], tokens)
        order = np.argsort(-scores, axis=1, kind="stable")
        found = np.take_along_axis(tokens, order, 1) == wanted[:, None]
        ranks = np.where(found.any(1), found.argmax(1), MISSED)
        return [int(rank) for rank in ranks]
