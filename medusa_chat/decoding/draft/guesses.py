"""Guesses: the heads' likeliest tokens behind one root, as the host reads them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

MISSED = -1  # rank of a token that is not among a head's guesses


class Guesses:
    """The likeliest tokens of each head behind one root."""

    def __init__(self, rows: list[list[int]]) -> None:
        """Take the guesses of each head, likeliest first."""
        self._rows = rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guesses) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    @property
    def rows(self) -> list[list[int]]:
        """Guesses of each head, the likeliest for the head alone first."""
        return self._rows

    @property
    def heads(self) -> int:
        """How many heads guessed."""
        return len(self._rows)

    def ranks(self, followed: Sequence[int]) -> list[int]:
        """Rank tokens that follow the root among the guesses of heads 1, 2, ...

        A token's rank is the one that it has if those before it are right.
        """
        pairs = zip(self._rows, followed, strict=False)
        return [row.index(token) if token in row else MISSED for row, token in pairs]


@dataclass(frozen=True)
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


class ScoredGuesses(Guesses):
    """Guesses whose order is not the heads' own, or depends on the token before them."""

    def __init__(
        self, tokens: np.ndarray, scores: np.ndarray, root: int, bias: HostBias | None
    ) -> None:
        """Take the guesses of K heads.

        Args:
            tokens: [K, C], no token twice in a row.
            scores: [K, C], by which the guesses of each head are ranked.
            root: the token that they follow.
            bias: is added to the scores, by a guess and its parent; None without.
        """
        super().__init__([])
        self._tokens, self._scores = tokens, scores
        self._root, self._bias = root, bias
        self._known: tuple[Sequence[int], list[int]] = ((), [])  # the last that were ranked

    @property
    def rows(self) -> list[list[int]]:
        """Guesses of each head, the likeliest for the head alone first."""
        return [[int(token) for token in row] for row in self._tokens]

    @property
    def heads(self) -> int:
        """How many heads guessed."""
        return len(self._tokens)

    def ranks(self, followed: Sequence[int]) -> list[int]:
        """Rank tokens as `Guesses.ranks` does, each behind the token before it."""
        wanted = followed[: self.heads]
        if self._known[0] != wanted:
            self._known = (wanted, self._ranks(wanted))
        return self._known[1]

    def _ranks(self, followed: Sequence[int]) -> list[int]:
        count = len(followed)
        if not count:
            return []
        tokens, scores = self._tokens[:count], self._scores[:count]
        if self._bias is not None:
            parents = np.array([self._root, *followed[:-1]])
            scores = scores + self._bias.of(parents, tokens)
        found = tokens == np.array(followed)[:, None]
        heads, place = np.arange(count), found.argmax(1)
        own = scores[heads, place][:, None]
        earlier = np.arange(tokens.shape[1]) < place[:, None]
        before = (scores > own) | ((scores == own) & earlier)
        ranks: list[int] = np.where(found[heads, place], before.sum(1), MISSED).tolist()
        return ranks
