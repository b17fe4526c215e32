"""Compare the heads' guesses with the tokens that followed, and learn from it. No torch here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.trees.accuracy import Accuracy, Frequencies
from medusa_chat.decoding.trees.copy_gain import CopyGain
from medusa_chat.decoding.trees.fading import FadingCounter
from medusa_chat.decoding.trees.growth import grow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from medusa_chat.decoding.draft.guesses import Guesses
    from medusa_chat.decoding.trees.tree import NodePath, Tree

# One step in so many is compared: a comparison takes as long as a small model's forward.
COMPARED = 4
ACCURACY_PRIOR = 100  # compared steps that the accuracies from before count for
ACCURACY_MEMORY = 400  # compared steps after which one counts 1/e of a new one


class OnlineAccuracy(Frequencies):
    """Accuracies from before, updated by the steps of this conversation.

    The count of a path is blended with its frequency from before. For a path that was not measured,
    "before" is the product of the heads' chances, which the ranks of each head update likewise.

    Attributes:
        seen: compared steps of this conversation.
    """

    def __init__(self, before: Accuracy) -> None:
        self.seen = 0
        self._before = before
        self._paths: FadingCounter[NodePath] = FadingCounter(ACCURACY_MEMORY, ACCURACY_PRIOR)
        # By depth and rank.
        self._ranks: FadingCounter[tuple[int, int]] = FadingCounter(ACCURACY_MEMORY, ACCURACY_PRIOR)
        self._updated: Accuracy | None = None
        self._changed: float | None = None

    @property
    def widths(self) -> list[int]:
        """Ranked guesses of each head."""
        return self._before.widths

    def add(self, ranks: Sequence[int]) -> None:
        """Count a step: ranks[k - 1] is where head k ranked the token that followed, or MISSED."""
        self.seen += 1
        self._updated = self._changed = None
        self._paths.begin_step()
        self._ranks.begin_step()
        right_so_far = True
        for depth, (rank, width) in enumerate(zip(ranks, self.widths, strict=True)):
            if not 0 <= rank < width:
                right_so_far = False
                continue
            self._ranks.add((depth, rank))
            if right_so_far:
                self._paths.add(tuple(ranks[: depth + 1]))

    def frequency(self, path: NodePath) -> float:
        """Share of the steps in which every guess along the path is right."""
        if not path:
            return 1.0
        return self._paths.rate(path, self._with_updated_ranks().frequency(path))

    def forecast_dynamic(self, nodes: int) -> float | None:
        """Acceptance length as measured before, scaled by the change of a fixed tree's."""
        before = self._before.forecast_dynamic(nodes)
        return None if before is None else before * self._change()

    def _change(self) -> float:
        """Acceptance length of a fixed tree now, over that from before."""
        if self._changed is None:
            tree, before = self._reference
            self._changed = self.forecast_static(tree) / before
        return self._changed

    @cached_property
    def _reference(self) -> tuple[Tree, float]:
        tree = grow(self._before, 16)[0]
        return tree, self._before.forecast_static(tree)

    def _with_updated_ranks(self) -> Accuracy:
        """Blend the chance of each rank with its count; measured paths stay."""
        if self._updated is None:
            rows = []
            for depth, gains in enumerate(self._before.gains):
                chances = (self._ranks.rate((depth, rank), gain) for rank, gain in enumerate(gains))
                rows.append(tuple(accumulate(chances)))
            self._updated = Accuracy(tuple(rows), self._before.paths)
        return self._updated


@dataclass
class _Pending:
    """A step's guesses and copies, and the tokens that have followed its root so far."""

    guesses: Guesses
    copied: Copied | None
    followed: list[int]


class GuessTracker:
    """Compares the guesses of some steps with the tokens that follow, once these are known.

    A step counts only if all the guessed tokens belong to the same reply: the heads do not guess
    the user's next message.

    Attributes:
        accuracy: the heads' accuracies that the comparison updates.
        gain: the copies' gain that it updates.
    """

    def __init__(self, accuracy: OnlineAccuracy) -> None:
        self.accuracy = accuracy
        self.gain = CopyGain()
        self._heads = len(accuracy.widths)
        self._since_compared = COMPARED
        self._for_heads: deque[_Pending] = deque()
        self._for_copies: deque[_Pending] = deque()

    def begin(self) -> None:
        """Begin a reply: drop the steps of the last one that still wait for tokens."""
        self._for_heads.clear()
        self._for_copies.clear()

    def observe(
        self, tokens: Sequence[int], read: Callable[[], Guesses], copied: Copied | None = None
    ) -> None:
        """Take in a step.

        Args:
            tokens: the tokens that stay in the text, its root first.
            read: returns the heads' guesses after the root; those of no head for a vanilla step.
            copied: the copies that were proposed after the root.
        """
        for pending in (*self._for_heads, *self._for_copies):
            pending.followed += tokens
        self._since_compared += 1
        if tokens and self._heads and self._since_compared >= COMPARED:
            self._compare_later(read(), copied, tokens[1:])
        for done in _complete(self._for_heads, self._heads):
            self.accuracy.add(done.guesses.ranks(done.followed))
        for done in _complete(self._for_copies, CHAIN):
            self.gain.add(done.guesses, done.copied, done.followed)

    def _compare_later(
        self, guesses: Guesses, copied: Copied | None, followed: Sequence[int]
    ) -> None:
        if guesses.heads != self._heads:
            return
        self._since_compared = 0
        self._for_heads.append(_Pending(guesses, copied, list(followed)))
        self._for_copies.append(_Pending(guesses, copied, list(followed)))


def _complete(queue: deque[_Pending], needed: int) -> Iterator[_Pending]:
    """Remove the steps that enough tokens have followed."""
    while queue and len(queue[0].followed) >= needed:
        yield queue.popleft()
