"""Heads without the parts that a layout has no place for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from medusa_chat.model.heads import MedusaHeads


def fit(heads: MedusaHeads, vocabulary: bool) -> MedusaHeads:
    """Take the parent bias off heads, and their vocabulary if the layout has none; in place.

    LM heads of their own get a row for each token of the backbone. A token that the heads did not
    rank has the mean of all rows: its logit is the mean of the others', never the largest and,
    among thousands, never near it. Heads that share the backbone's LM head rank all its tokens.

    Args:
        heads: as their file has them.
        vocabulary: the layout can hold a vocabulary of heads.
    """
    heads.parent_bias = None
    if heads.vocabulary is None or vocabulary:
        return heads
    if heads.lm_heads is not None:
        rows = [_expanded(own, heads) for own in heads.lm_heads.detach()]
        heads.lm_heads = nn.Parameter(torch.stack(rows), requires_grad=False)
    heads.vocabulary = None
    return heads


def _expanded(own: Tensor, heads: MedusaHeads) -> Tensor:
    """Return an LM head's rows for all tokens: [N, hidden] -> [V, hidden]."""
    assert heads.vocabulary is not None
    mean = own.mean(0, dtype=torch.float32).to(own.dtype)
    every = mean.repeat(heads.vocabulary.size, 1)
    every[heads.vocabulary.tokens] = own
    return every
