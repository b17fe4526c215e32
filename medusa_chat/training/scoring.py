"""A loss of many guesses over a large vocabulary, with the gradient taken on the way.

Logits exist for a few rows at a time. Their gradient follows at once, so that a backward pass only
scales what is there, and no matmul with an LM head is done twice (as Liger's fused kernel does it,
arXiv:2410.10989). Softmax and gradient are computed in place, in parts that stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from medusa_chat.training.guesses import outputs, project, trained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.training.guesses import Projection

LOGITS = 2**27  # logits held at once: half a gigabyte in float32
CACHED = 2**20  # logits of a part on a CPU
LEAST = 1e-30  # of a sum in a logarithm
# From log q of some tokens of each row, [n, m], from that of all others together, [n], and from the
# rows' numbers: the summed loss.
Objective = Callable[[Tensor, Tensor, slice], Tensor]


class Scores(NamedTuple):
    """What a pass over n rows has found.

    Attributes:
        loss: the objective's sum, with a gradient.
        log_q: [n], of the first of each row's tokens.
        right: [n], no token is likelier than that one.
        fifth: at most four tokens are likelier than that one, for every `step`-th row.
    """

    loss: Tensor
    log_q: Tensor
    right: Tensor
    fifth: Tensor


@dataclass(frozen=True)
class _Task:
    """The parts of a pass that have no gradient."""

    projection: Projection
    weights: Sequence[Tensor]
    tokens: Tensor
    objective: Objective
    size: int  # rows whose logits exist at once
    step: int


def score(
    rows: Tensor,
    tokens: Tensor,
    projection: Projection,
    objective: Objective,
    share: int = 1,
    step: int = 1,
) -> Scores:
    """Compute an objective of the softmax of logits.

    Args:
        rows: [n, width], what `projection` turns into logits [n, N].
        tokens: [n, m], the tokens of each row whose log q the objective gets.
        projection: the LM head.
        objective: a differentiable sum over rows.
        share: passes whose rows share the budget of LOGITS at once.
        step: distance of the rows that `fifth` tells about.
    """
    size = max(LOGITS // share // outputs(projection), 1)
    task = _Task(projection, trained(projection), tokens, objective, size, step)
    if not torch.is_grad_enabled():
        return Scores(*_pass(rows, task, learning=False)[:4])
    found = _Scored.apply(task, rows, *task.weights)  # type: ignore[no-untyped-call]
    return Scores(*found)


class _Scored(torch.autograd.Function):
    """The pass, whose gradient is known when it ends."""

    @staticmethod
    def forward(ctx: Any, task: _Task, rows: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        *found, gradients = _pass(rows, task, learning=True)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * upstream[0].to(g.dtype) for g in ctx.gradients]
        return (None, *scaled)


def _pass(rows: Tensor, task: _Task, *, learning: bool) -> tuple[Any, ...]:
    """Return the fields of Scores, and the gradients of rows and weights."""
    loss = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    log_q = loss.new_empty(len(rows))
    right = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    fifth = torch.empty_like(right)
    of_rows = torch.empty_like(rows)
    of_weights: list[Tensor | None] = [None] * len(task.weights)
    for start in range(0, max(len(rows), 1), task.size):  # without rows all gradients are zero
        piece = slice(start, min(start + task.size, len(rows)))
        with torch.set_grad_enabled(learning):
            given = rows[piece].detach().requires_grad_(learning)
            logits = project(given, task.projection)
        slopes = logits.detach()
        for part in _parts(slopes):
            where = slice(start + part.start, start + part.stop)
            found = _softmax(slopes[part], task, where, learning=learning)
            loss += found[0]
            log_q[where], right[where], fifth[where] = found[1:]
        if learning:
            wanted = (given, *task.weights)
            first, *others = torch.autograd.grad(logits, wanted, slopes, allow_unused=True)
            of_rows[piece] = first
            of_weights = [_plus(*pair) for pair in zip(of_weights, others, strict=True)]
    return loss, log_q, right, fifth[:: task.step], [of_rows, *of_weights]


def _parts(logits: Tensor) -> list[slice]:
    """Split the rows of logits into parts that fit into a CPU's cache; a GPU takes them at once."""
    rows = len(logits)
    if not logits.is_cuda:
        rows = max(CACHED // logits.shape[1], 1)
    return [slice(a, min(a + rows, len(logits))) for a in range(0, len(logits), max(rows, 1))]


def _softmax(
    logits: Tensor, task: _Task, where: slice, *, learning: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log q, right and fifth of some rows; their logits become the loss's gradient."""
    tokens = task.tokens[where]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(-1, keepdim=True)
    chosen = wide.gather(-1, tokens)
    right = chosen[:, 0] == top[:, 0]
    fifth = torch.zeros_like(right)
    sampled = slice(-where.start % task.step, None, task.step)
    fifth[sampled] = (wide[sampled] > chosen[sampled, :1]).sum(-1) < 5
    wide.sub_(top).exp_()
    total = wide.sum(-1, keepdim=True)
    # Summed by itself: as a difference from 1, a small q of the others would be lost.
    others = wide.scatter_(-1, tokens, 0.0).sum(-1, keepdim=True).clamp_(min=LEAST)
    log_q = torch.cat([chosen - top, others.log()], -1) - total.log()
    with torch.set_grad_enabled(learning):
        log_q.requires_grad_(learning)
        loss = task.objective(log_q[:, :-1], log_q[:, -1], where)
    found = loss.detach(), log_q.detach()[:, 0], right, fifth
    if learning:
        (slope,) = torch.autograd.grad(loss, log_q)
        whole = slope.sum(-1, keepdim=True)
        wide.mul_(slope[:, -1:] / others - whole / total)
        # A token that comes twice has one q, and the slopes of both.
        wide.scatter_(-1, tokens, -whole * log_q.detach()[:, :-1].exp())
        wide.scatter_add_(-1, tokens, slope[:, :-1])
        if wide is not logits:
            logits.copy_(wide)
    return found


def _plus(sum_: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Add in place where there is something to add."""
    if sum_ is None or more is None:
        return more if sum_ is None else sum_
    return sum_.add_(more)
