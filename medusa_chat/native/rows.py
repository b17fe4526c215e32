"""The rows of a step as the library reads them: a fixed tree's, or what they are chosen from."""

from __future__ import annotations

from ctypes import addressof, c_float, c_int32
from typing import TYPE_CHECKING, Any, NamedTuple

from medusa_chat.native.structures import (
    MOST_CHAIN,
    MOST_DEPTH,
    MOST_GUESSES,
    MOST_ROWS,
    Choice,
    Coupling,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class FixedRows:
    """The rows of a fixed tree.

    Attributes:
        size: how many.
        ranked: guesses of each head that they take, 0 if no heads run.
    """

    def __init__(self, parents: Sequence[int], places: Sequence[int], ranked: int) -> None:
        """Describe a tree.

        Args:
            parents: [n], each above its children; the root's does not matter.
            places: [n], where each token lies in the root and the flattened guesses
                [1 + heads * ranked].
            ranked: guesses of each head that the tree takes.
        """
        if ranked > MOST_GUESSES or len(parents) > MOST_ROWS:
            raise ValueError(f"at most {MOST_ROWS} rows of {MOST_GUESSES} guesses of each head")
        self.size, self.ranked = len(parents), ranked
        self.parents = (c_int32 * self.size)(*parents)
        self.places = (c_int32 * self.size)(*places)


class Line(NamedTuple):
    """How a head's log p becomes that of its guess being right: min(0, scale * log p + shift).

    In a coupled step the last two weigh the tempered log p and the noise before.
    """

    scale: float = 1.0
    shift: float = 0.0
    of_log_p: float = 1.0
    of_noise: float = 1.0


class Noise(NamedTuple):
    """The noise that a step's targets will be drawn with, and the law that they are drawn from."""

    seed: int
    position: int  # of the root
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class ChosenRows:
    """The rows of a tree that are chosen anew at each step. Not for two steps at once.

    Attributes:
        size: how many are chosen.
        ranked: guesses of each head that they are chosen from, 0 if no heads run.
        measured: the likelihood of each path is known; how sure the heads are decides at most
            which token has which rank.
        choice: what the library reads and writes.
        noise: of each candidate of the last coupled step, [heads * ranked] and unused numbers.
    """

    def __init__(
        self,
        parents: Sequence[int],
        ranks: Sequence[int],
        size: int,
        ranked: int,
        *,
        lines: Sequence[Line] = (),
        measured: Sequence[float] | None = None,
    ) -> None:
        """Describe a superset of S paths, in the order of a Tree.

        Args:
            parents: [S], the row of each path's parent; the root's does not matter.
            ranks: [S], each path's last rank; the root's does not matter.
            size: rows to choose.
            ranked: guesses of each head that paths are made of.
            lines: of each depth; what is missing changes nothing.
            measured: [S], log p of each path's last guess if those before it are right, in place
                of what the heads say.
        """
        if ranked > MOST_GUESSES or size > MOST_ROWS:
            raise ValueError(f"at most {MOST_ROWS} rows of {MOST_GUESSES} guesses of each head")
        self.size, self.ranked, self.measured = size, ranked, measured is not None
        each_depth = [*lines, *[Line()] * (len(parents) - len(lines))]
        scale, shift, of_log_p, of_noise = map(_floats, zip(*each_depth, strict=True))
        ints, rows = c_int32 * len(parents), c_int32 * size
        self._read = ints(*parents), ints(*ranks), _floats(measured or ())
        self._lines = scale, shift, of_log_p, of_noise
        self.noise = (c_float * (MOST_DEPTH * MOST_GUESSES))()
        self._chain = (c_int32 * MOST_CHAIN)(), (c_float * MOST_CHAIN)()
        self._rows, self._tokens, self._parents = rows(), rows(), rows()
        self._coupling = Coupling(
            of_log_p=addressof(of_log_p),
            of_noise=addressof(of_noise),
            noise=addressof(self.noise),
        )
        self.choice = self._choice()

    def _choice(self) -> Choice:
        scale, shift, *_ = self._lines
        parents, ranks, measured = self._read
        return Choice(
            len(parents),
            addressof(parents),
            addressof(ranks),
            self.size,
            addressof(scale),
            addressof(shift),
            addressof(measured) if self.measured else None,
            0,
            addressof(self._chain[0]),
            addressof(self._chain[1]),
            None,
            addressof(self._rows),
            addressof(self._tokens),
            addressof(self._parents),
        )

    def set(
        self, tokens: Sequence[int] = (), log_p: Sequence[float] = (), noise: Noise | None = None
    ) -> None:
        """Take what is new at a step.

        Args:
            tokens: of a copied chain.
            log_p: of each if those before it are right.
            noise: of a step whose guesses are coupled to it.
        """
        count = len(tokens)
        if count > MOST_CHAIN:
            raise ValueError(f"at most {MOST_CHAIN} copied tokens")
        self.choice.chain = count
        self._chain[0][:count] = list(tokens)
        self._chain[1][:count] = list(log_p)
        self.choice.coupling = None
        if noise is not None:
            for name, value in noise._asdict().items():
                setattr(self._coupling, name, value)
            self.choice.coupling = addressof(self._coupling)

    @property
    def rows(self) -> list[int]:
        """The chosen rows, ascending: below S a path, from S on a token of the chain."""
        return self._rows[:]

    @property
    def parents(self) -> list[int]:
        """The place in `rows` of each row's parent; the root is its own."""
        return self._parents[:]

    @property
    def tokens(self) -> list[int]:
        """The token of each row."""
        return self._tokens[:]

    @property
    def joint(self) -> int:
        """Row of the path from which the chosen tokens of the chain branch off; 0 without any."""
        return int(self.choice.joint)


def _floats(values: Sequence[float]) -> Any:
    return (c_float * len(values))(*values)
