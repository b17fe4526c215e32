"""Guesses copied from the conversation itself: what followed the last tokens when they last stood there. No torch.

The idea is that of prompt lookup and of SAM decoding: free guesses, worth most where a reply quotes its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import exp, log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHAIN = 10  # tokens that are proposed at once
GRAMS = (1, 2, 4, 8)  # runs of tokens that are looked up
LONGEST = max(GRAMS)  # tokens of a match; longer ones are not told apart
# How often the token behind a match of 1, 2, ... tokens is right before a conversation shows it, and how many
# observations that counts for.
PRIOR = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
PRIOR_WEIGHT = 8.0
MEMORY = 0.98  # what an observation still counts for after the next one of its kind


@dataclass(frozen=True)
class Copied:
    """A chain of proposed tokens.

    Attributes:
        tokens: CHAIN of them, in order.
        log_p: log_p[k]: natural logarithm of the chance that token k is right if those before it are; below 0.
        match: tokens that the text's end shares with the place copied from, LONGEST at most.
    """

    tokens: tuple[int, ...]
    log_p: tuple[float, ...]
    match: int

    @property
    def promise(self) -> float:
        """Tokens that a step of this chain alone should bring, the root included."""
        return 1.0 + sum(map(exp, accumulate(self.log_p)))


class Copies:
    """An index of a growing text that can be cut, and how well its proposals have done. O(1) a token."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._places: dict[
            tuple[int, ...], int
        ] = {}  # a run of tokens -> where the text last went on behind it
        self._replaced: list[
            list[int | None]
        ] = []  # for each token, what its entries took the place of
        self._right = [PRIOR_WEIGHT * share for share in PRIOR]
        self._tested = [PRIOR_WEIGHT] * LONGEST

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text's end."""
        places = self._places
        for token in tokens:
            replaced = []
            for gram in self._ends():
                replaced.append(places.get(gram))
                places[gram] = len(self._text)
            self._replaced.append(replaced)
            self._text.append(token)

    def rewind(self, length: int) -> None:
        """Cut the text to its first `length` tokens; the index is then as if the rest had never been there."""
        while len(self._text) > length:
            self._text.pop()
            for gram, place in zip(self._ends(), self._replaced.pop(), strict=True):
                if place is None:
                    del self._places[gram]
                else:
                    self._places[gram] = place

    def propose(self) -> Copied | None:
        """What followed the text's end where it last stood before, by the longest run; None if its last token is new.

        A chain that reaches the text's end goes on with its own beginning, as a loop would.
        """
        places = [place for gram in self._ends() if (place := self._places.get(gram)) is not None]
        if not places:
            return None
        place = places[-1]
        source = self._text[place : place + CHAIN]
        chain = [source[k % len(source)] for k in range(CHAIN)]
        match = self._match(place)
        # The hundredth keeps the logarithm finite where nothing was right for very long.
        log_p = [
            log((self._right[row] + 0.01) / (self._tested[row] + 0.01)) for row in _rows(match)
        ]
        return Copied(tuple(chain), tuple(log_p), match)

    def learn(self, copied: Copied, followed: Sequence[int]) -> None:
        """Take in what really followed a proposal, token by token up to the first miss."""
        for row, proposed, token in zip(_rows(copied.match), copied.tokens, followed, strict=False):
            self._right[row] = MEMORY * self._right[row] + (proposed == token)
            self._tested[row] = MEMORY * self._tested[row] + 1
            if proposed != token:
                return

    def _match(self, place: int) -> int:
        """How many tokens before `place` are those of the text's end."""
        text, match = self._text, 0
        while match < min(LONGEST, place) and text[place - 1 - match] == text[-1 - match]:
            match += 1
        return match

    def _ends(self) -> Iterator[tuple[int, ...]]:
        """The text's last tokens, as many as GRAMS says."""
        text, length = self._text, len(self._text)
        return (tuple(text[length - n :]) for n in GRAMS if n <= length)


def _rows(match: int) -> list[int]:
    """Rows of the table for each token of a chain: one that is right makes the match longer."""
    return [min(match + ahead, LONGEST) - 1 for ahead in range(CHAIN)]
