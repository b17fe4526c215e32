"""Losses of guesses towards the backbone's own distribution p, of which the likeliest are known.

All other tokens are one more outcome, the rest: its p is what is left of 1, and its q what is left
in the head's distribution q. A kept token that the heads do not rank belongs to the rest. Each loss
is that of these outcomes, so sum min(p, q) is an upper bound of the one over all tokens, KL and L1
are lower bounds, and nothing passes over the vocabulary again.
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

L1_SHARE = 0.9  # of L1 in DSpark's loss, where cross entropy has the rest (arXiv:2607.05147)
NOTHING = -1e4  # log of no probability


class Comparison(NamedTuple):
    """The backbone's distribution at n places, by the tokens that heads rank.

    Attributes:
        tokens: [n, k], indices of the kept tokens; the target's for one that is not ranked.
        log_p: [n, k + 1], the rest last; NOTHING for a token that is not ranked.
        apart: [n], the target is none of the kept tokens, so its q is a part of the rest.
    """

    tokens: Tensor
    log_p: Tensor
    apart: Tensor


def compare(likely: Likeliest, targets: Tensor, vocabulary: HeadVocabulary | None) -> Comparison:
    """Arrange the likeliest tokens at n places, [n, k], and the indices of targets, [n]."""
    tokens = likely.tokens.long()
    log_p = likely.log_p
    ranked = torch.ones_like(tokens, dtype=torch.bool)
    if vocabulary is not None:
        tokens = vocabulary.rows[tokens]
        ranked = tokens < len(vocabulary)
        log_p = log_p.masked_fill(~ranked, NOTHING)
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    log_rest = torch.where(rest > 0, rest, 1.0).log().masked_fill(rest <= 0, NOTHING)
    apart = ~(ranked & (tokens == targets[:, None])).any(-1)
    tokens = torch.where(ranked, tokens, targets[:, None])
    return Comparison(tokens, torch.cat([log_p, log_rest], -1), apart)


def objective_of(loss: str, comparison: Comparison, ranked: Tensor) -> Objective:
    """Make the objective `lk`, `kl` or `l1` of a head.

    Its log q are [n, 1 + k]: of the target, and of the kept tokens.

    Args:
        loss: its name.
        comparison: what the head is compared with, at all n places.
        ranked: [n], the head ranks the target. Others have no cross entropy, in the mean of l1.
    """
    entropy = (1 - L1_SHARE) * len(ranked) / ranked.sum().clamp(min=1)

    def objective(log_q: Tensor, log_others: Tensor, where: slice) -> Tensor:
        log_p = comparison.log_p[where].to(log_q.dtype)
        target = log_q[:, 0].masked_fill(~comparison.apart[where], NOTHING)
        rest = torch.logaddexp(log_others, target)[:, None]
        unknown = log_p[:, :-1] == NOTHING
        outcomes = torch.cat([log_q[:, 1:].masked_fill(unknown, NOTHING), rest], -1)
        if loss != "l1":
            return BY_NAME[loss](log_p, outcomes).sum()
        targets = log_q[:, 0] * ranked[where]
        return L1_SHARE * distance(log_p, outcomes).sum() - entropy * targets.sum()

    return objective


def acceptance_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log sum min(p, q), of the probability to accept a guess (LK loss of arXiv:2602.23881).

    log p and log q are those of n places' outcomes, [n, k + 1]; returns [n], as the others do.
    """
    return -torch.minimum(log_p, log_q).logsumexp(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum |p - q|, twice the total variation."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1)


BY_NAME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lk": acceptance_loss,
    "kl": divergence,
}
