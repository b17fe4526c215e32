"""The rules of acceptance with every number of the sampling in one tensor, so that a captured step can be replayed
with others. Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import Rule, TreeTensors, Verdict, exact, greedy, typical

if TYPE_CHECKING:
    from medusa_chat.config import Sampling

# As double, which holds each of them exactly: top_k and the 32-bit seed too.
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "epsilon", "delta", "seed")
# What differs in the operations themselves. Sampling without truncation is apart because truncation sorts the scores.
Kind = Literal["greedy", "typical", "exact", "typical-truncated", "exact-truncated"]
KINDS: tuple[Kind, ...] = ("greedy", "typical", "exact", "typical-truncated", "exact-truncated")


def kind_of(rule: Rule) -> Kind:
    """Which of KINDS does what the rule does."""
    sampling = rule.sampling
    cut = rule.kind != "greedy" and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    return f"{rule.kind}-truncated" if cut else rule.kind  # type: ignore[return-value]


def numbers_of(sampling: Sampling) -> list[float]:
    """The sampling as `decide` takes it."""
    return [float(getattr(sampling, name)) for name in NUMBERS]


def decide(
    kind: Kind,
    numbers: Tensor,
    logits: Tensor,
    candidates: Tensor,
    tree: TreeTensors,
    position: Tensor,
) -> Verdict:
    """What `acceptance.make_rule` decides, from NUMBERS [7] in double and a position [] on the device."""
    if kind == "greedy":
        return greedy(logits, candidates, tree, position)
    temperature, top_k, top_p, min_p, epsilon, delta, seed = numbers.unbind()

    def warp(logits: Tensor) -> Tensor:
        scores = logits.float() / temperature.float()
        return truncated(scores, top_k, top_p, min_p) if kind.endswith("truncated") else scores

    if kind.startswith("typical"):
        return typical(
            logits,
            candidates,
            tree,
            position,
            warp=warp,
            seed=seed.long(),
            epsilon=epsilon.float(),
            delta=delta.float(),
        )
    return exact(logits, candidates, tree, position, warp=warp, seed=seed.long())


def truncated(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Transformers' top-k, top-p and min-p warpers in turn, each off where it would be off in a Sampling.

    Args:
        scores: float32 [n, V]; top_k, top_p, min_p: double [].
    """
    vocabulary = scores.shape[-1]
    k = top_k.masked_fill(top_k == 0, vocabulary).long().clamp(max=vocabulary)
    least = scores.sort(descending=True).values.index_select(-1, k[None] - 1)
    scores = scores.masked_fill(scores < least, float("-inf"))
    # Sorted again as transformers does: among equal scores that straddle top_p's edge, the same ones have to go.
    rising, order = scores.sort()
    off = (rising.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    off &= torch.arange(vocabulary, device=scores.device) < vocabulary - 1  # the likeliest stays
    scores = scores.masked_fill(off.scatter(-1, order, off), float("-inf"))
    p = scores.softmax(-1)
    return scores.masked_fill(p < min_p.float() * p.amax(-1, keepdim=True), float("-inf"))
