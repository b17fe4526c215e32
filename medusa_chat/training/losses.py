"""Losses of Medusa training (paper, section 2.2). Head k from hidden state t answers for token t + k + 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medusa_chat.model.heads import MedusaHeads
from medusa_chat.training.data import IGNORED

CHUNK = 8192  # rows of logits held at once


@dataclass(frozen=True)
class HeadsLoss:
    """The weighted sum to train on, and per head the mean cross entropy and top-1 accuracy (detached)."""

    total: Tensor
    losses: Tensor
    accuracy: Tensor


def head_targets(labels: Tensor, positions: Tensor, head: int) -> Tensor:
    """What `head` (from 1) should say at each place: the label head + 1 places on, in the same document.

    Args:
        labels: [rows, length], IGNORED where no loss falls.
        positions: [rows, length], counting up within a document.

    Returns:
        [rows, length], IGNORED where there is no such label.
    """
    ahead = head + 1
    targets = torch.full_like(labels, IGNORED)
    same = positions[:, ahead:] == positions[:, :-ahead] + ahead
    targets[:, :-ahead] = labels[:, ahead:].masked_fill(~same, IGNORED)
    return targets


def heads_loss(
    heads: MedusaHeads, lm_head: nn.Linear, hidden: Tensor, labels: Tensor, positions: Tensor, decay: float
) -> HeadsLoss:
    """Sum over heads of decay ** k times their mean cross entropy (paper, equation 1).

    Args:
        hidden: [rows, length, hidden], the backbone's last hidden states.
    """
    features = heads.features(hidden.flatten(0, 1))  # [K, rows * length, hidden]
    losses, correct = [], []
    for k in range(heads.heads):
        targets = head_targets(labels, positions, k + 1).flatten()
        answered = targets != IGNORED
        projection = lm_head.weight if heads.lm_heads is None else heads.lm_heads[k]
        loss, right = _cross_entropy(features[k][answered], projection, targets[answered])
        count = answered.sum().clamp(min=1)
        losses.append(loss / count)
        correct.append(right / count)
    stacked = torch.stack(losses)
    weights = decay ** torch.arange(1, heads.heads + 1, device=stacked.device)
    return HeadsLoss((weights * stacked).sum(), stacked.detach(), torch.stack(correct).detach())


def _cross_entropy(features: Tensor, projection: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and number of right answers; no more than CHUNK rows of logits exist at once."""
    pieces = list(zip(features.split(CHUNK), targets.split(CHUNK), strict=True))
    if len(pieces) == 1:
        return _chunk(*pieces[0], projection)
    sums = [checkpoint(_chunk, *piece, projection, use_reentrant=False) for piece in pieces]
    return torch.stack([loss for loss, _ in sums]).sum(), torch.stack([right for _, right in sums]).sum()


def _chunk(features: Tensor, targets: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    logits = functional.linear(features, projection.to(features.dtype)).float()
    return functional.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()
