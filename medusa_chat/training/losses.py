"""The loss of Medusa heads (paper, section 2.2). Head k at token t predicts token t + k + 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from medusa_chat.training.data import IGNORED
from medusa_chat.training.entropy import score_targets, summed_entropy
from medusa_chat.training.guesses import HeadRows, head_parents, head_rows
from medusa_chat.training.objectives import compare, objective_of
from medusa_chat.training.reference import Likeliest
from medusa_chat.training.scoring import Scores, score

if TYPE_CHECKING:
    from medusa_chat.config import Loss
    from medusa_chat.model.heads import MedusaHeads

SAMPLED_ROWS = 512  # rows of a batch that top-1 and top-5 are counted on


@dataclass(frozen=True)
class HeadsLoss:
    """The loss of all heads. A figure without a place is NaN; `until-fail` has fewer places.

    Attributes:
        total: the weighted sum to minimize.
        losses: [heads], mean cross entropy of each head.
        top1: [heads], share of a sample of its places whose target is the head's likeliest guess.
        top5: [heads], share of those whose target is among its five likeliest guesses.
    """

    total: Tensor
    losses: Tensor
    top1: Tensor
    top5: Tensor


def head_targets(labels: Tensor, positions: Tensor, head: int) -> Tensor:
    """Targets of `head`, where 0 is the LM head: the label head + 1 tokens later.

    Labels, positions and targets are [rows, length]. Positions count up within a document. A target
    is IGNORED if its document has no such label.
    """
    ahead = head + 1
    targets = torch.full_like(labels, IGNORED)
    same = positions[:, ahead:] == positions[:, :-ahead] + ahead
    targets[:, :-ahead] = labels[:, ahead:].masked_fill(~same, IGNORED)
    return targets


def heads_loss(
    heads: MedusaHeads,
    lm_head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    positions: Tensor,
    decay: float,
    tokens: Tensor | None = None,
    loss: Loss = "ce",
    likely: Likeliest | None = None,
) -> HeadsLoss:
    """Sum over heads of decay ** k times their mean loss (paper, equation 1).

    Args:
        heads: the heads. Targets outside their vocabulary have no cross entropy, and count as
            missed guesses.
        lm_head: the backbone's.
        hidden: the backbone's last hidden states, [rows, length, hidden].
        labels: [rows, length].
        positions: [rows, length].
        decay: the weight of a head relative to the one before.
        tokens: [rows, length], which heads with a bias by the parent need.
        loss: its name. `until-fail` is the cross entropy where the heads before are right with
            their likeliest guesses (arXiv:2607.01893). Its sum is divided by the number of all
            targets of the head, not by that of those that count: a target that counts then pulls
            as it does in `ce`, a head that is seldom reached learns from few targets but not from
            their noise made large, and the gradient is that of the expected length of the accepted
            text, in which head k counts as often as it is reached.
        likely: the backbone's own distribution of the next token at each place, [rows, length, k],
            for `lk`, `kl` and `l1`. Head k is compared with the one k tokens later.
    """
    features = heads.features(hidden.flatten(0, 1))  # [heads, rows * length, hidden]
    shared = heads.shared(lm_head) if heads.lm_heads is None else None
    batch = _Batch(heads, shared, labels, positions, tokens, loss, likely)
    total = hidden.new_zeros(())
    figures = []
    reached = torch.ones_like(labels, dtype=torch.bool).flatten()
    for k in range(heads.heads):
        found = _head_loss(batch, k, features[k], reached)
        total = total + decay ** (k + 1) * found.loss
        figures.append(torch.stack([found.entropy, found.top1, found.top5]))
        if loss == "until-fail":
            reached = found.right
    losses, top1, top5 = torch.stack(figures).T
    return HeadsLoss(total, losses, top1, top5)


@dataclass(frozen=True)
class _Batch:
    """What the losses of all heads share; see heads_loss."""

    heads: MedusaHeads
    shared: nn.Module | None
    labels: Tensor
    positions: Tensor
    tokens: Tensor | None
    loss: Loss
    likely: Likeliest | None


class _HeadLoss(NamedTuple):
    """The loss of one head; `right` tells for each place if it has a target and guesses it."""

    loss: Tensor
    entropy: Tensor
    top1: Tensor
    top5: Tensor
    right: Tensor


def _head_loss(batch: _Batch, k: int, features: Tensor, reached: Tensor) -> _HeadLoss:
    """Compute the loss of head k, from 0, at the places that are reached; features [n, hidden]."""
    heads = batch.heads
    targets = head_targets(batch.labels, batch.positions, k + 1).flatten()
    answered = targets != IGNORED
    if heads.vocabulary is not None:
        ranked = heads.vocabulary.rows[targets.clamp(min=0)] < len(heads.vocabulary)
    else:
        ranked = torch.ones_like(answered)
    count = (answered & ranked).sum() if batch.likely is None else answered.sum()
    asked = answered & reached
    used = asked & ranked if batch.likely is None else asked
    places = used.nonzero()[:, 0]
    projection = batch.shared if heads.lm_heads is None else heads.lm_heads[k]
    assert projection is not None
    parents = None
    if batch.tokens is not None:
        parents = head_parents(batch.tokens, k + 1).flatten()[places]
    rows = features.index_select(0, places)
    head = head_rows(heads, projection, rows, targets[places], parents)
    found = _score_head(batch, k, head, places, ranked[places])
    return _figures(found, places, ranked[places], asked, count)


def _score_head(batch: _Batch, k: int, head: HeadRows, places: Tensor, ranked: Tensor) -> Scores:
    """Score one head's guesses at `places`, where it ranks the target or not."""
    count = batch.heads.heads
    step = _step(places)
    targets = head.wanted * ranked
    if batch.loss == "ce":
        return score_targets(head.rows, targets, head.projection, count, step)
    if batch.likely is None:  # until-fail needs to know of every row if it is right
        return score(head.rows, targets[:, None], head.projection, summed_entropy, count, step)
    tokens, log_p = (part.flatten(0, 1)[places + k + 1] for part in batch.likely)
    comparison = compare(Likeliest(tokens, log_p), targets, batch.heads.vocabulary)
    objective = objective_of(batch.loss, comparison, ranked)
    picked = torch.cat([targets[:, None], comparison.tokens], -1)
    return score(head.rows, picked, head.projection, objective, count, step)


def _figures(
    found: Scores, places: Tensor, ranked: Tensor, asked: Tensor, count: Tensor
) -> _HeadLoss:
    """Turn sums over `places`, a part of those that are asked, into means. `count` divides."""
    right = torch.zeros_like(asked)
    right[places] = found.right & ranked
    sampled = ranked[:: _step(places)]
    share = len(places) / asked.sum()  # NaN without targets, as the means of nothing below
    top1 = right[places][:: _step(places)].float().mean().nan_to_num() * share
    top5 = (found.fifth & sampled).float().mean().nan_to_num() * share
    entropy = -found.log_q[ranked].mean()
    return _HeadLoss(found.loss / count.clamp(min=1), entropy.detach(), top1, top5, right)


def _step(places: Tensor) -> int:
    """Distance between the places of a sample."""
    return max(len(places) // SAMPLED_ROWS, 1)
