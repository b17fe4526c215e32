"""The backbone's own distribution of the next token, as its likeliest tokens and the rest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LIKELIEST = 32  # tokens that are kept of a distribution
LOGITS = 2**26  # logits held at once


class Likeliest(NamedTuple):
    """The k likeliest next tokens at some places; what is left of 1 belongs to all others.

    Attributes:
        tokens: [..., k] int32, likeliest first.
        log_p: [..., k] float32, their log probabilities.
    """

    tokens: Tensor
    log_p: Tensor


@torch.no_grad()
def likeliest(hidden: Tensor, lm_head: Any, wanted: Tensor) -> Likeliest:
    """Find the likeliest tokens after last hidden states [..., hidden].

    Only places that are `wanted`, [...] booleans, are computed; the others hold zeros. A small
    vocabulary is kept whole.
    """
    rows = hidden[wanted]
    count = min(LIKELIEST, int(lm_head.out_features))
    found = [_likeliest(piece, lm_head, count) for piece in rows.split(_piece(lm_head))]
    tokens = hidden.new_zeros((*wanted.shape, count), dtype=torch.int32)
    log_p = hidden.new_zeros((*wanted.shape, count), dtype=torch.float32)
    if found:
        tokens[wanted] = torch.cat([piece.tokens for piece in found])
        log_p[wanted] = torch.cat([piece.log_p for piece in found])
    return Likeliest(tokens, log_p)


def _likeliest(rows: Tensor, lm_head: Any, count: int) -> Likeliest:
    logits = lm_head(rows).float()
    best = logits.topk(count)
    log_p = best.values - logits.logsumexp(-1, keepdim=True)
    return Likeliest(best.indices.int(), log_p)


def _piece(lm_head: Any) -> int:
    return max(LOGITS // int(lm_head.out_features), 1)
