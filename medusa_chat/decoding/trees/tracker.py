"""How often the heads are right in this conversation: their accuracies, updated from what followed. No torch."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.trees.accuracy import Accuracy, Frequencies, grow
from medusa_chat.decoding.trees.copy_gain import CopyGain

if TYPE_CHECKING:
    from medusa_chat.decoding.trees.tree import NodePath, Tree

PRIOR = 200  # steps that the accuracies from before count for
MEMORY = 1000  # steps after which a step counts 1/e of a new one
MISSED = -1  # rank of a token that is not among a head's guesses


class OnlineAccuracy(Frequencies):
    """Accuracies from before, as so many steps, and the steps of this conversation, older ones fading.

    A path's frequency is its count and PRIOR times what was known before, over all steps. For paths that nobody
    measured, "before" is the product of the heads' chances, which are updated likewise from their ranks alone.
    """

    def __init__(self, before: Accuracy) -> None:
        self.seen = 0  # steps of this conversation, faded or not
        self._before = before
        self._paths: dict[NodePath, float] = defaultdict(float)
        self._ranks: list[dict[int, float]] = [defaultdict(float) for _ in before.top]
        self._steps = 0.0
        # A new step counts more than those before it: the same as fading all those, at no cost.
        self._unit = 1.0
        self._base: Accuracy | None = None

    @property
    def widths(self) -> list[int]:
        return self._before.widths

    def add(self, ranks: Sequence[int]) -> None:
        """Count a step: ranks[k - 1] is where head k held the token that followed, or MISSED."""
        self._unit *= MEMORY / (MEMORY - 1)
        if self._unit > 1e6:
            self._rescale()
        self.seen += 1
        self._steps += self._unit
        holds = True
        for depth, (rank, width) in enumerate(zip(ranks, self.widths, strict=True)):
            if not 0 <= rank < width:
                holds = False
                continue
            self._ranks[depth][rank] += self._unit
            if holds:
                self._paths[tuple(ranks[: depth + 1])] += self._unit
        self._base = None

    def frequency(self, path: NodePath) -> float:
        if not path:
            return 1.0
        return self._blend(self._paths.get(path, 0.0), self._updated().frequency(path))

    def forecast_dynamic(self, nodes: int) -> float | None:
        """As measured before, times what this conversation makes of a fixed tree."""
        before = self._before.forecast_dynamic(nodes)
        if before is None:
            return None
        return (
            before
            * self.forecast_static(self._yardstick)
            / self._before.forecast_static(self._yardstick)
        )

    @cached_property
    def _yardstick(self) -> Tree:
        return grow(self._before, 16)[0]

    def _updated(self) -> Accuracy:
        """The accuracies from before with the chance of each rank updated; measured paths stay."""
        if self._base is None:
            rows = (
                accumulate(
                    self._blend(counts.get(rank, 0.0), gain) for rank, gain in enumerate(gains)
                )
                for counts, gains in zip(self._ranks, self._before.gains, strict=True)
            )
            self._base = Accuracy(tuple(map(tuple, rows)), self._before.paths)
        return self._base

    def _blend(self, count: float, before: float) -> float:
        return (count / self._unit + PRIOR * before) / (self._steps / self._unit + PRIOR)

    def _rescale(self) -> None:
        """Count in units of now; what has all but faded goes."""
        self._paths, self._steps = _faded(self._paths, self._unit), self._steps / self._unit
        self._ranks = [_faded(counts, self._unit) for counts in self._ranks]
        self._unit = 1.0


def _faded(counts: dict[Any, float], unit: float) -> dict[Any, float]:
    return defaultdict(
        float, {key: count / unit for key, count in counts.items() if count > 1e-3 * unit}
    )


Guesses = Sequence[Sequence[int]]  # of each head, likeliest first
_Heard = tuple[
    Guesses, Copied | None, list[int]
]  # what a step guessed and copied, and what followed so far


class GuessTracker:
    """Compares the guesses of each step with the tokens that followed, as soon as these are known.

    A step counts once every token that was guessed is known, and only if all of them belong to the same reply: what
    the user says next is not what the heads guess.

    Attributes:
        accuracy, gain: what it teaches.
    """

    def __init__(self, accuracy: OnlineAccuracy) -> None:
        self.accuracy, self.gain = accuracy, CopyGain()
        self._heads = len(accuracy.widths)
        # Steps that wait for as many tokens as heads or copies guessed, and what is then done with them.
        self._waiting: tuple[tuple[deque[_Heard], int, Callable[..., None]], ...] = (
            (deque(), self._heads, self._count),
            (deque(), CHAIN, self.gain.add),
        )

    def begin(self) -> None:
        """A new reply: guesses of the one before stay unanswered."""
        for steps, *_ in self._waiting:
            steps.clear()

    def observe(
        self, tokens: Sequence[int], guesses: Guesses, copied: Copied | None = None
    ) -> None:
        """Take in a step: the tokens that stay in the text, its root first, and each head's guesses behind the root
        (none for a vanilla step), and what was copied behind it.
        """
        for steps, enough, take in self._waiting:
            for *_, followed in steps:
                followed += tokens
            if tokens and guesses and len(guesses) == self._heads:
                steps.append((guesses, copied, list(tokens[1:])))
            while steps and len(steps[0][2]) >= enough:
                take(*steps.popleft())

    def _count(self, guesses: Guesses, copied: Copied | None, followed: Sequence[int]) -> None:
        self.accuracy.add(
            [_rank(row, token) for row, token in zip(guesses, followed, strict=False)]
        )


def _rank(guesses: Sequence[int], token: int) -> int:
    return guesses.index(token) if token in guesses else MISSED
