"""Calibration of the heads' probabilities, and the acceptance length of dynamic trees."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.draft.dynamic import DynamicDraft
from medusa_chat.decoding.draft.ranking import Candidates
from medusa_chat.decoding.report import PackedInput, StepInput
from medusa_chat.decoding.trees.growth import dynamic_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from medusa_chat.decoding.draft.base import Guessing
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.decoding.trees.tree import DynamicTree
    from medusa_chat.training.observations import Guessed, Observed

HIGHEST_LOG_P = -1e-3  # so that one wrong guess has a bounded cost
SHARPNESS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 2.0)  # factors that are tried


def calibrated(
    accuracy: Accuracy,
    replies: Sequence[Guessed],
    begun: Sequence[Sequence[int]],
    sizes: Sequence[int],
    guessing: Callable[[Accuracy], Guessing],
) -> Accuracy:
    """Add the heads' calibration, and the acceptance length of dynamic trees of `sizes` nodes.

    `begun` has the tokens of each reply at which steps begin. The guesses before them missed, so
    guessing is harder there.
    """
    pairs = [head_pairs(replies, begun, head) for head in range(1, len(accuracy.top) + 1)]
    fitted = replace(accuracy, calibration=tuple(fit(log_p, right) for log_p, right in pairs))
    observed = [reply.observed for reply in replies]
    lengths = {}
    for nodes in sizes:
        length = dynamic_length(dynamic_tree(fitted, nodes), guessing(fitted), observed)
        if length is not None:
            lengths[nodes] = length
    return replace(fitted, dynamic=lengths)


def sharpest(tried: Mapping[float, Sequence[Guessed]]) -> tuple[float, ...]:
    """Choose the factor of each head's log p that makes the right guesses likeliest.

    `tried` has the replies in the order that each factor gives.
    """
    found = {factor: _mean_log_p(replies) for factor, replies in tried.items()}
    heads = len(next(iter(found.values())))
    return tuple(max(found, key=lambda factor: found[factor][head]) for head in range(heads))


def _mean_log_p(replies: Sequence[Guessed]) -> list[float]:
    """Mean log p of each head's right guesses."""
    table = torch.cat([reply.table.T for reply in replies])  # [n, K]
    log_p = torch.cat([reply.log_p for reply in replies])
    right = log_p.gather(-1, table.clamp(min=0)[..., None])[..., 0]
    known = table >= 0
    return (right.masked_fill(~known, 0.0).sum(0) / known.sum(0).clamp(min=1)).tolist()


def head_pairs(
    replies: Sequence[Guessed], begun: Sequence[Sequence[int]], head: int
) -> tuple[Tensor, Tensor]:
    """The log p of a head's guesses and 1 for each right one, where all heads before are right."""
    log_p = [torch.empty(0)]
    right = [torch.empty(0)]
    for reply, places in zip(replies, begun, strict=True):
        every = reply.ranks
        for place in places:
            ranks = every[place]
            # The reply may end before the head's token.
            if len(ranks) < head - 1 or place + head > len(every):
                continue
            guesses = reply.log_p[place, head - 1]
            hit = torch.zeros(len(guesses))
            if len(ranks) >= head:
                hit[ranks[head - 1]] = 1
            log_p.append(guesses)
            right.append(hit)
    return torch.cat(log_p), torch.cat(right)


def fit(log_p: Tensor, right: Tensor) -> tuple[float, float]:
    """Fit scale and shift so that min(0, scale * log_p + shift) is the log p of being right.

    log_p: [m], natural logarithms. right: [m], 1 for a right guess, else 0.
    """
    if not 0 < right.sum() < len(right):
        return 1.0, 0.0
    with torch.inference_mode(False), torch.enable_grad():
        line = torch.tensor([1.0, 0.0], requires_grad=True)
        optimizer = torch.optim.LBFGS([line], max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            fitted = (line[0] * log_p + line[1]).clamp(max=HIGHEST_LOG_P)
            total = -(right * fitted + (1 - right) * torch.log1p(-fitted.exp())).mean()
            total.backward()
            return total.item()

        optimizer.step(loss)
    scale, shift = line.tolist()
    return (round(scale, 4), round(shift, 4)) if 0 < scale < 100 else (1.0, 0.0)


@torch.inference_mode()
def dynamic_length(
    tree: DynamicTree, guessing: Guessing, replies: Sequence[Observed]
) -> float | None:
    """Acceptance length of decoding with a dynamic tree over replies; None for no step."""
    draft = DynamicDraft(tree, guessing, copied=False)
    tokens = [1 + depth for reply in replies for depth in _depths_reached(draft, reply)]
    return sum(tokens) / len(tokens) if tokens else None


def _depths_reached(draft: DynamicDraft, observed: Observed) -> Iterator[int]:
    reply = observed.reply
    place = 0
    while place < len(reply) - 1:
        given = StepInput(reply[place], observed.position + place, observed.numbers)
        packed = PackedInput(torch.tensor(given.pack(), dtype=torch.float64))
        candidates = _first(observed.at(place), draft.ranked)
        nodes = draft.nodes(packed, candidates, observed.numbers)
        tokens, parents = nodes.candidates.tolist(), nodes.tensors.parents.tolist()
        depth = _depth_reached(tokens, parents, reply[place + 1 :])
        yield depth
        place += 1 + depth


def _first(candidates: Candidates, count: int) -> Candidates:
    """The likeliest `count` candidates of each head."""
    assert candidates.log_p is not None
    parts = (candidates.tokens, candidates.log_p, candidates.indices)
    return Candidates(*(part[:, :count] for part in parts))


def _depth_reached(tokens: list[int], parents: list[int], followed: list[int]) -> int:
    """Follow tokens from the root of a tree: how many of its nodes are right."""
    children = {(parents[row], tokens[row]): row for row in range(1, len(tokens))}
    row = 0
    for depth, token in enumerate(followed):
        if (row, token) not in children:
            return depth
        row = children[row, token]
    return len(followed)
