"""Which candidates a step keeps, and which token follows them: greedy, typical, exact.

Every rule is a pure function of tensors on one device, without a copy to the host (which indexing by a tensor of no
dimensions would be) and with shapes that depend on nothing but the tree's. What is a number of the sampling, or the
position, may be a tensor [] of the device. Shapes: n nodes, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from medusa_chat.config import Sampling
    from medusa_chat.decoding.trees.tree import Tree

_MIX_1, _MIX_2, _STRIDE = 0x7FEB352D, 0x846CA68B - 2**32, 0x2545F4914F6CDD1D


@dataclass(frozen=True)
class TreeTensors:
    """A tree's topology on a device: parents [n], depths [n], ancestors [n, n] (self included).

    Attributes:
        depth: no node lies deeper; known without a look at the device.
    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    depth: int

    @classmethod
    def of(cls, tree: Tree, device: torch.device) -> TreeTensors:
        ancestors = torch.zeros(len(tree), len(tree), dtype=torch.bool)
        for row, branch in enumerate(tree.branches):
            ancestors[row, list(branch)] = True
        parents, depths = (
            torch.tensor(tree.parents, device=device),
            torch.tensor(tree.depths, device=device),
        )
        return cls(parents, depths, ancestors.to(device), tree.depth)


@dataclass(frozen=True)
class Verdict:
    """What a step keeps: the row of the deepest accepted node, and the token that follows it. Both []."""

    row: Tensor
    next: Tensor


Number = float | Tensor
Warp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """What a sampling accepts: takes logits [n, V], candidates [n], the tree, and the root's position in the text."""

    kind: Literal["greedy", "typical", "exact"]
    sampling: Sampling
    decide: Callable[[Tensor, Tensor, TreeTensors, int], Verdict]

    def __call__(
        self, logits: Tensor, candidates: Tensor, tree: TreeTensors, position: int
    ) -> Verdict:
        return self.decide(logits, candidates, tree, position)


def greedy(
    logits: Tensor, candidates: Tensor, tree: TreeTensors, position: int | Tensor
) -> Verdict:
    """A candidate stays while it is the argmax after its parent: the output is that of greedy decoding."""
    # As float32 because the CPU's argmax over 16 bits is five times as slow.
    return _matching(logits.float().argmax(-1), candidates, tree)


def exact(
    logits: Tensor,
    candidates: Tensor,
    tree: TreeTensors,
    position: int | Tensor,
    *,
    warp: Warp,
    seed: int | Tensor,
) -> Verdict:
    """Lossless sampling: after every node a token is drawn, and a child stays if it is that token.

    The noise is keyed by (seed, position, token), so a draw does not depend on the tree: the text is that of
    vanilla sampling with the same seed.
    """
    scores = warp(logits)
    positions = torch.arange(1, tree.depth + 2, device=scores.device) + position
    noise = gumbel(seed, positions, scores.shape[-1])[
        tree.depths
    ]  # nodes of one depth share theirs
    return _matching((scores + noise).argmax(-1), candidates, tree)


def typical(
    logits: Tensor,
    candidates: Tensor,
    tree: TreeTensors,
    position: int | Tensor,
    *,
    warp: Warp,
    seed: int | Tensor,
    epsilon: Number,
    delta: Number,
) -> Verdict:
    """Typical acceptance (paper, section 2.3.1): x stays if p(x) > min(epsilon, delta * exp(-H(p))).

    The longest accepted path wins, ties by summed log-likelihood; the next token is drawn from what the same
    rule leaves of the distribution.
    """
    log_p = warp(logits).log_softmax(-1)
    p = log_p.exp()
    # The clamp makes 0 * log 0 nothing; no sum notices it otherwise.
    entropy = -torch.linalg.vecdot(p, log_p.clamp(min=-1e4))
    threshold = (delta * torch.exp(-entropy)).clamp(max=epsilon)  # [n]
    candidate_log_p = log_p[tree.parents, candidates]
    kept = candidate_log_p.exp() > threshold[tree.parents]
    row = _deepest(kept, tree, candidate_log_p)
    last = row[None]
    p = p[last]  # [1, V]
    # The likeliest token always stays, so that a delta above 1 can't leave nothing to draw from.
    allowed = (p > threshold[last]) | (p == p.max())
    scores = log_p[last].masked_fill(~allowed, float("-inf"))
    noise = gumbel(seed, tree.depths[last] + position + 1, scores.shape[-1])
    return Verdict(row, (scores + noise).argmax())


def _matching(chosen: Tensor, candidates: Tensor, tree: TreeTensors) -> Verdict:
    """Keep the path on which every candidate is the token chosen after its parent. chosen: [n]"""
    row = _deepest(candidates == chosen[tree.parents], tree, None)
    return Verdict(row, chosen[row[None]][0])


def _deepest(kept: Tensor, tree: TreeTensors, log_p: Tensor | None) -> Tensor:
    """The row of the deepest node whose whole path is kept; ties by summed log_p. kept: [n] -> []"""
    off = ~kept & (tree.depths > 0)  # the root was chosen by the backbone itself
    alive = ~(tree.ancestors & off).any(-1)
    depth = tree.depths.masked_fill(~alive, -1)
    if log_p is None:
        return depth.argmax()
    likelihood = (
        log_p.expand(len(depth), -1).masked_fill(~tree.ancestors | (tree.depths == 0), 0.0).sum(-1)
    )
    return likelihood.masked_fill(depth < depth.max(), float("-inf")).argmax()


def path_to(row: Tensor, tree: TreeTensors) -> Tensor:
    """Rows from the root down to node `row`; the root again where the path is over.

    Args:
        row: [].

    Returns:
        [min(depth + 1, n)]
    """
    levels = torch.arange(min(tree.depth + 1, len(tree.depths)), device=row.device)
    return (tree.ancestors[row[None]] & (tree.depths == levels[:, None])).int().argmax(-1)


def make_warp(sampling: Sampling) -> Warp:
    """Temperature and truncation as transformers does them: logits [n, V] -> float32 scores [n, V]."""
    steps: Any = LogitsProcessorList()
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    no_text = torch.empty(0, dtype=torch.long)  # these warpers look at the scores alone
    return lambda logits: steps(no_text, logits.float() / sampling.temperature)


def make_rule(sampling: Sampling) -> Rule:
    """The rule of a mode; at temperature 0 each is greedy."""
    if sampling.greedy:
        return Rule("greedy", sampling, greedy)
    drawn: dict[str, Any] = {"warp": make_warp(sampling), "seed": sampling.seed}
    if sampling.mode == "typical":
        drawn |= {"epsilon": sampling.epsilon, "delta": sampling.delta}
        return Rule("typical", sampling, partial(typical, **drawn))
    return Rule("exact", sampling, partial(exact, **drawn))


def gumbel(seed: int | Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise that depends on (seed, position, token id) alone: [m] -> [m, V].

    The bits are lowbias32 (C. Wellons, hash-prospector) of both keys; integer arithmetic wraps as it needs.
    """
    keys = positions * _STRIDE + seed * 0x9E3779B1
    bits = token_keys(vocabulary, positions.device) ^ _mix((keys ^ (keys >> 32)).int())[:, None]
    # Float32 is finest near 0, where the large values come from; 0 and 1 have none.
    uniform = (
        _mix(bits).bitwise_and_(2**31 - 1).float().mul_(2.0**-31).clamp_(2.0**-32, 1 - 2.0**-24)
    )
    return uniform.neg_().log1p_().neg_().log_().neg_()


@lru_cache(maxsize=4)
def token_keys(vocabulary: int, device: torch.device) -> Tensor:
    return _mix(torch.arange(1, vocabulary + 1, dtype=torch.int32, device=device))


def _mix(x: Tensor) -> Tensor:
    """Spread every bit of int32 x, which is used up, over the whole word; shifts are made logical by a mask."""
    x ^= (x >> 16).bitwise_and_(2**16 - 1)
    x *= _MIX_1
    x ^= (x >> 15).bitwise_and_(2**17 - 1)
    x *= _MIX_2
    x ^= (x >> 16).bitwise_and_(2**16 - 1)
    return x
