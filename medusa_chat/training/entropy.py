"""Cross entropy of tokens, and KL of a backbone to another; on CUDA Liger's kernel if it can."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medusa_chat.training import scoring
from medusa_chat.training.guesses import Projection, outputs, project
from medusa_chat.training.scoring import Scores, score

if TYPE_CHECKING:
    from collections.abc import Callable


def score_targets(
    rows: Tensor, targets: Tensor, projection: Projection, share: int = 1, step: int = 1
) -> Scores:
    """Score the summed cross entropy of targets [n]; rows are [n, width], as in `score`.

    Liger's kernel tells no single row's figures. Then `right` is known for every `step`-th row
    alone, and each log q is the mean.
    """
    fused = _fused(rows, projection)
    if fused is None:
        return score(rows, targets[:, None], projection, summed_entropy, share, step)
    loss = fused(rows, targets)
    with torch.no_grad():
        best = project(rows[::step], projection).topk(5, dim=-1).indices
    hits = best == targets[::step, None]
    right = torch.zeros_like(targets, dtype=torch.bool)
    right[::step] = hits[:, 0]
    mean = -loss.detach() / len(rows)
    return Scores(loss, mean.expand(len(rows)), right, hits.any(-1))


def cross_entropy(features: Tensor, targets: Tensor, projection: Projection) -> Tensor:
    """Summed cross entropy of features [n, hidden] and targets [n]."""
    return score_targets(features, targets, projection).loss


def summed_entropy(log_q: Tensor, *_: Any) -> Tensor:
    """Sum the cross entropy of targets, whose log q is the first column of [n, m]."""
    return -log_q[:, 0].sum()


def distillation(
    features: Tensor,
    reference: Tensor,
    student: nn.Module,
    teacher: Callable[[Tensor], Tensor],
) -> Tensor:
    """Summed KL(teacher || student) of next-token distributions (paper, section 2.3.2).

    `features` and `reference` are the last hidden states of student and teacher, [n, hidden].
    `student` and `teacher` compute logits from them. Logits over the budget are computed again
    backwards.
    """

    def piece(rows: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = _wide(teacher(theirs)).log_softmax(-1)
        ours = _wide(student(rows)).log_softmax(-1)
        return functional.kl_div(ours, wanted, log_target=True, reduction="sum")

    return _in_pieces(piece, features, reference, 2 * outputs(student))


def _in_pieces(
    piece: Callable[[Tensor, Tensor], Tensor],
    features: Tensor,
    others: Tensor,
    width: int,
) -> Tensor:
    """Sum of `piece` over rows. Rows over the budget are split, and computed again backwards."""
    size = max(scoring.LOGITS // width, 1)
    if len(features) <= size:
        return piece(features, others)
    pieces = zip(torch.split(features, size), torch.split(others, size), strict=True)
    return torch.stack([checkpoint(piece, *rows, use_reentrant=False) for rows in pieces]).sum()


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
