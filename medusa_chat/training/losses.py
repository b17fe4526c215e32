"""Losses of Medusa training (paper, section 2.2). Head k at token t predicts token t + k + 1.

Logits are computed for a few rows at a time and again for the gradient, so that
[heads, tokens, vocabulary] never exists at once. On CUDA, Liger's fused kernel does the same
faster if it is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medusa_chat.training.data import IGNORED
from medusa_chat.training.guesses import Projection, head_parents, head_rows, outputs, project

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.model.heads import MedusaHeads

LOGITS = 2**27  # logits held at once: half a gigabyte in float32
SAMPLED_ROWS = 512  # rows of a batch that top-1 and top-5 are counted on


@dataclass(frozen=True)
class HeadsLoss:
    """The loss of all heads. A figure without a row is NaN.

    Attributes:
        total: the weighted sum to minimize.
        losses: [heads], mean cross entropy of each head.
        top1: [heads], share of a sample of rows whose target is the head's likeliest guess.
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
) -> HeadsLoss:
    """Sum over heads of decay ** k times their mean cross entropy (paper, equation 1).

    `hidden` are the backbone's last hidden states, [rows, length, hidden]; labels, positions and
    tokens, which heads with a bias by the parent need, are [rows, length]. Targets outside the
    heads' vocabulary have no loss, and count as missed guesses.
    """
    features = heads.features(hidden.flatten(0, 1))  # [heads, rows * length, hidden]
    own = heads.lm_heads
    shared = heads.shared(lm_head) if own is None else lm_head
    total = hidden.new_zeros(())
    losses = []
    accuracies = []
    for k in range(heads.heads):
        targets = head_targets(labels, positions, k + 1).flatten()
        answered = targets != IGNORED
        parents = None if tokens is None else head_parents(tokens, k + 1).flatten()[answered]
        projection = shared if own is None else own[k]
        rows, wanted, projection = head_rows(
            heads, projection, features[k][answered], targets[answered], parents
        )
        accuracies.append(_top_1_and_5(rows, wanted, projection))
        if heads.vocabulary is not None:
            ranked = wanted < len(heads.vocabulary)
            rows, wanted = rows[ranked], wanted[ranked]
        summed = cross_entropy(rows, wanted, projection, budget=LOGITS // heads.heads)
        loss = summed / max(len(wanted), 1)
        total = total + decay ** (k + 1) * loss
        losses.append(loss.detach() if len(wanted) else loss.new_tensor(math.nan))
    top1, top5 = torch.stack(accuracies).T
    return HeadsLoss(total, torch.stack(losses), top1, top5)


def cross_entropy(
    features: Tensor, targets: Tensor, projection: Projection, budget: int = LOGITS
) -> Tensor:
    """Summed cross entropy of features [n, hidden] and targets [n].

    At most `budget` logits exist at once.
    """
    if fused := _fused(features, projection):
        return fused(features, targets)

    def piece(rows: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(_wide(project(rows, projection)), wanted, reduction="sum")

    return _in_pieces(piece, features, targets, outputs(projection), budget)


def distillation(
    features: Tensor,
    reference: Tensor,
    student: nn.Module,
    teacher: Callable[[Tensor], Tensor],
    budget: int = LOGITS,
) -> Tensor:
    """Summed KL(teacher || student) of next-token distributions (paper, section 2.3.2).

    `features` and `reference` are the last hidden states of student and teacher, [n, hidden].
    `student` and `teacher` compute logits from them.
    """

    def piece(rows: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = _wide(teacher(theirs)).log_softmax(-1)
        ours = _wide(student(rows)).log_softmax(-1)
        return functional.kl_div(ours, wanted, log_target=True, reduction="sum")

    return _in_pieces(piece, features, reference, 2 * outputs(student), budget)


def _in_pieces(
    piece: Callable[[Tensor, Tensor], Tensor],
    features: Tensor,
    others: Tensor,
    width: int,
    budget: int,
) -> Tensor:
    """Sum of `piece` over rows. Rows over the budget are split, and computed again backwards."""
    size = max(budget // width, 1)
    if len(features) <= size:
        return piece(features, others)
    pieces = zip(torch.split(features, size), torch.split(others, size), strict=True)
    return torch.stack([checkpoint(piece, *rows, use_reentrant=False) for rows in pieces]).sum()


@torch.no_grad()
def _top_1_and_5(features: Tensor, targets: Tensor, projection: Projection) -> Tensor:
    """Top-1 and top-5 accuracy over a sample of rows, [2]; NaN without rows."""
    step = max(len(targets) // SAMPLED_ROWS, 1)
    logits = project(features[::step], projection)
    guesses = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    found = guesses == targets[::step, None]
    return torch.stack([found[:, 0].float().mean(), found.any(-1).float().mean()])


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32 or wider, as a softmax needs."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _fused(features: Tensor, projection: Projection) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger's cross entropy for plain weights on CUDA, if it is installed."""
    if not features.is_cuda or not len(features):
        return None
    if isinstance(projection, Tensor):
        weight = projection
    elif type(projection) is nn.Linear and getattr(projection, "bias", None) is None:
        weight = projection.weight
    else:
        return None
    kernel = _liger()
    if kernel is None:
        return None
    dtype = features.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return lambda rows, targets: kernel(weight.to(dtype), rows.to(dtype), targets)


@cache
def _liger() -> nn.Module | None:
    try:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError:
        return None
    kernel: nn.Module = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return kernel


class _Capped(nn.Module):
    """An LM head with Gemma's softcap on its logits."""

    def __init__(self, lm_head: Any, softcap: float) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.softcap = softcap
        self.out_features = lm_head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return torch.tanh(logits / self.softcap) * self.softcap


class Frozen(nn.Module):
    """An LM head that passes gradients on to its input, but takes none."""

    def __init__(self, lm_head: Any) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.out_features = lm_head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] of hidden states [..., hidden]."""
        detached = {
            name: weight.detach()
            for name, weight in self.lm_head.named_parameters()
            if weight.requires_grad
        }
        logits: Tensor = functional_call(self.lm_head, detached, (hidden,))
        return logits


def output_layer(backbone: Any) -> nn.Module:
    """The layer from last hidden states to the logits of a transformers causal LM."""
    lm_head: nn.Module = backbone.get_output_embeddings()
    softcap = getattr(backbone.config.get_text_config(), "final_logit_softcapping", None)
    return _Capped(lm_head, softcap) if softcap else lm_head
