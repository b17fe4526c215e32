"""A bias on a head's logits by the token before the guess, which the head itself cannot know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from medusa_chat.model.head_vocabulary import HeadVocabulary

START = 0.02  # standard deviation of a new bias's first matrix


class ParentBias(nn.Module):
    """Logits that the token before a guess adds, of low rank, the same for all heads.

    Head k, from 1, guesses token t + k + 1 from text position t. Its parent is token t + k: the
    root, for head 1, or the guess of the head before (Markov bias of DSpark, arXiv:2607.05147).

    Attributes:
        first: [P, rank], a row for each parent: all V tokens, or the N of a head vocabulary and
            one for any other.
        second: [N, rank], a row for each token that the heads rank.
        rows: long [V], the row of `first` for each token; None if it is the token's id.
    """

    rows: Tensor | None

    def __init__(
        self, first: Tensor, second: Tensor, vocabulary: HeadVocabulary | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(first)
        self.second = nn.Parameter(second)
        rows = None if vocabulary is None else vocabulary.rows
        self.register_buffer("rows", rows, persistent=False)

    @property
    def rank(self) -> int:
        """Columns of each matrix."""
        return self.first.shape[1]

    def features(self, parents: Tensor) -> Tensor:
        """Look parents up: token ids [...] -> [..., rank]."""
        return self.first[parents if self.rows is None else self.rows[parents]]

    def forward(self, parents: Tensor) -> Tensor:
        """Return what parents add to each logit: token ids [...] -> [..., N]."""
        return self.features(parents) @ self.second.T


def new_parent_bias(rank: int, size: int, vocabulary: HeadVocabulary | None = None) -> ParentBias:
    """Make a bias that is zero at first, for `size` tokens or those of a head vocabulary.

    The first matrix is drawn from torch's generator, so that the second has a gradient.
    """
    tokens = size if vocabulary is None else len(vocabulary)
    parents = size if vocabulary is None else tokens + 1
    first = START * torch.randn(parents, rank)
    return ParentBias(first, torch.zeros(tokens, rank), vocabulary)
