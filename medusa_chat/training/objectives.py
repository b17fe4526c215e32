"""Losses of guesses: towards the text's tokens, or towards the backbone's own distribution p.

Of p the likeliest tokens are known. All other tokens are one more outcome, the rest: its p is what
is left of 1, and so is its q in the head's distribution q. A kept token that the heads do not rank
belongs to the rest. Each loss is that of these outcomes, so sum min(p, q) is an upper bound of the
one over all tokens, KL and L1 are lower bounds, and nothing passes over the vocabulary again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.model.head_vocabulary import HeadVocabulary
    from medusa_chat.training.reference import Likeliest
    from medusa_chat.training.scoring import Objective

L1_SHARE = 0.9  # of L1 in DSpark's loss, the cross entropy's is the rest (arXiv:2607.05147)
NOTHING = -1e4  # log p of an outcome without probability
LEAST_REST = 1e-6  # of q in KL: differences from 1 are no smaller in float32


class Comparison(NamedTuple):
    """The backbone's distribution at n places, by the tokens that heads rank.

    Attributes:
        tokens: [n, k], indices of the kept tokens among those N; 0 for one that is not ranked.
        log_p: [n, k + 1], the rest last; NOTHING for a token that is not ranked.
    """

    tokens: Tensor
    log_p: Tensor


def compare(likely: Likeliest, vocabulary: HeadVocabulary | None) -> Comparison:
    """Arrange the likeliest tokens at n places, [n, k], for heads with this vocabulary."""
    tokens = likely.tokens.long()
    log_p = likely.log_p
    if vocabulary is not None:
        tokens = vocabulary.rows[tokens]
        ranked = tokens < len(vocabulary)
        tokens = tokens * ranked
        log_p = log_p.masked_fill(~ranked, NOTHING)
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    log_rest = torch.where(rest > 0, rest.clamp(min=1e-30).log(), NOTHING)
    return Comparison(tokens, torch.cat([log_p, log_rest], -1))


def objective_of(loss: str, comparison: Comparison, ranked: Tensor) -> Objective:
    """Make the objective `lk`, `kl` or `l1` of a head.

    Its log q are [n, 1 + k]: of the target, and of the kept tokens.

    Args:
        loss: its name.
        comparison: what the head is compared with, at all n places.
        ranked: [n], the head ranks the target. Others have no cross entropy, in the mean of l1.
    """
    entropy = (1 - L1_SHARE) * len(ranked) / ranked.sum().clamp(min=1)

    def objective(log_q: Tensor, where: slice) -> Tensor:
        log_p = comparison.log_p[where].to(log_q.dtype)
        if loss == "l1":
            targets = log_q[:, 0] * ranked[where]
            return L1_SHARE * distance(log_p, log_q[:, 1:]).sum() - entropy * targets.sum()
        return BY_NAME[loss](log_p, log_q[:, 1:]).sum()

    return objective


def acceptance_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log sum min(p, q), of the probability to accept a guess (arXiv:2602.23881, equation of LK).

    log p is [n, k + 1], the rest last, and log q [n, k]; returns [n], as the others do.
    """
    rest = _rest(log_p, log_q).clamp(min=1e-30).log()
    return -torch.minimum(log_p, torch.cat([log_q, rest], -1)).logsumexp(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q)."""
    rest = _rest(log_p, log_q).clamp(min=LEAST_REST).log()
    return (log_p.exp() * (log_p - torch.cat([log_q, rest], -1))).sum(-1)


def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum |p - q|, twice the total variation."""
    q = torch.cat([_q(log_p, log_q), _rest(log_p, log_q)], -1)
    return (log_p.exp() - q).abs().sum(-1)


BY_NAME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lk": acceptance_loss,
    "kl": divergence,
}


def _q(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Q of the kept tokens, 0 for one that is not ranked."""
    return log_q.exp().masked_fill(log_p[:, :-1] == NOTHING, 0.0)


def _rest(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Q of all other tokens together, [n, 1]."""
    return (1 - _q(log_p, log_q).sum(-1, keepdim=True)).clamp(min=0.0)
