"""Guesses copied from the conversation: what followed when the text last ended like this.

The idea is that of prompt lookup and of SAM decoding: free guesses, worth most where a reply quotes
its prompt. No torch.
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
LONGEST = max(GRAMS)  # tokens of a match; longer ones count the same
# Chance that the token after a match of 1, 2, ... tokens is right, before a conversation shows it,
# and how many observations that counts for.
COPY_PRIOR = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
COPY_PRIOR_WEIGHT = 8.0
FADING = 0.98  # weight of an observation once the next one of its kind is there


@dataclass(frozen=True)
class Copied:
    """A chain of proposed tokens.

    Attributes:
        tokens: CHAIN of them, in order.
        log_p: log_p[k]: natural logarithm of the chance that token k is right if those before it
            are; below 0.
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
    """An index of a growing text that can be cut, and the record of its proposals.

    Adding or dropping a token takes constant time.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        # A run of tokens -> the place after its last occurrence in the text.
        self._places: dict[tuple[int, ...], int] = {}
        # For each token, the places that its entries replaced.
        self._replaced: list[list[int | None]] = []
        self._right = [COPY_PRIOR_WEIGHT * share for share in COPY_PRIOR]
        self._tested = [COPY_PRIOR_WEIGHT] * LONGEST

    def __len__(self) -> int:
        return len(self.text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text's end."""
        for token in tokens:
            replaced = []
            for gram in self._ends():
                replaced.append(self._places.get(gram))
                self._places[gram] = len(self.text)
            self._replaced.append(replaced)
            self.text.append(token)

    def rewind(self, length: int) -> None:
        """Cut the text to its first `length` tokens; the index forgets the rest."""
        while len(self.text) > length:
            self.text.pop()
            for gram, place in zip(self._ends(), self._replaced.pop(), strict=True):
                if place is None:
                    del self._places[gram]
                else:
                    self._places[gram] = place

    def propose(self) -> Copied | None:
        """Copy what followed the longest run that ends the text; None if its last token is new.

        A chain that reaches the text's end goes on with its own beginning, as a loop would.
        """
        places = [self._places[gram] for gram in self._ends() if gram in self._places]
        if not places:
            return None
        place = places[-1]
        source = self.text[place : place + CHAIN]
        chain = tuple(source[k % len(source)] for k in range(CHAIN))
        match = self._match(place)
        # The hundredth keeps the logarithm finite if nothing was right for very long.
        chances = ((self._right[row] + 0.01) / (self._tested[row] + 0.01) for row in _rows(match))
        return Copied(chain, tuple(map(log, chances)), match)

    def learn(self, copied: Copied, followed: Sequence[int]) -> None:
        """Compare a proposal with the tokens that followed, up to the first miss."""
        for row, proposed, token in zip(_rows(copied.match), copied.tokens, followed, strict=False):
            self._right[row] = FADING * self._right[row] + (proposed == token)
            self._tested[row] = FADING * self._tested[row] + 1
            if proposed != token:
                return

    def _match(self, place: int) -> int:
        """Count the tokens before `place` that equal the text's end."""
        text, match = self.text, 0
        while match < min(LONGEST, place) and text[place - 1 - match] == text[-1 - match]:
            match += 1
        return match

    def _ends(self) -> Iterator[tuple[int, ...]]:
        """Yield the text's last tokens, in runs as long as GRAMS says."""
        length = len(self.text)
        return (tuple(self.text[length - n :]) for n in GRAMS if n <= length)


def _rows(match: int) -> list[int]:
    """List a chain's rows in the record: a token that is right makes the match longer."""
    return [min(match + ahead, LONGEST) - 1 for ahead in range(CHAIN)]
