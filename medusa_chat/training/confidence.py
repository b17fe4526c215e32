"""Calibration of the heads' probabilities, and the acceptance length of dynamic trees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.draft.selection import Selector
from medusa_chat.decoding.trees.growth import dynamic_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.decoding.trees.tree import DynamicTree, NodePath

HIGHEST_LOG_P = -1e-3  # so that one wrong guess has a bounded cost


@dataclass(frozen=True)
class Guessed:
    """The heads' guesses at each token of a reply but the last.

    Attributes:
        ranks: the ranks that heads 1, 2, ... gave to the tokens that followed, up to the first
            head that missed, or to the end of the reply.
        log_p: [n, heads, RANKED_GUESSES], natural logarithms of the guesses' probabilities.
    """

    ranks: list[NodePath]
    log_p: Tensor


def calibrated(
    accuracy: Accuracy,
    replies: Sequence[Guessed],
    begun: Sequence[Sequence[int]],
    sizes: Sequence[int],
) -> Accuracy:
    """Add the heads' calibration, and the acceptance length of dynamic trees of `sizes` nodes.

    `begun` has the tokens of each reply at which steps begin. The guesses before them missed, so
    guessing is harder there.
    """
    pairs = [head_pairs(replies, begun, head) for head in range(1, len(accuracy.top) + 1)]
    fitted = replace(accuracy, calibration=tuple(fit(log_p, right) for log_p, right in pairs))
    lengths = {}
    for nodes in sizes:
        length = dynamic_length(dynamic_tree(fitted, nodes), fitted, replies)
        if length is not None:
            lengths[nodes] = length
    return replace(fitted, dynamic=lengths)


def head_pairs(
    replies: Sequence[Guessed], begun: Sequence[Sequence[int]], head: int
) -> tuple[Tensor, Tensor]:
    """The log p of a head's guesses and 1 for each right one, where all heads before are right."""
    log_p = [torch.empty(0)]
    right = [torch.empty(0)]
    for reply, places in zip(replies, begun, strict=True):
        for place in places:
            ranks = reply.ranks[place]
            # The reply may end before the head's token.
            if len(ranks) < head - 1 or place + head > len(reply.ranks):
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


def dynamic_length(
    tree: DynamicTree, accuracy: Accuracy, replies: Sequence[Guessed]
) -> float | None:
    """Acceptance length of greedy decoding with a dynamic tree over replies; None for no step."""
    tokens = [1 + depth for reply in replies for depth in _depths_reached(tree, accuracy, reply)]
    return sum(tokens) / len(tokens) if tokens else None


@torch.inference_mode()
def _depths_reached(tree: DynamicTree, accuracy: Accuracy, reply: Guessed) -> Iterator[int]:
    selector = Selector(tree.superset, len(tree), 0, reply.log_p.device)
    lines = torch.tensor([accuracy.calibration_of(head) for head in range(1, tree.depth + 1)])
    scale, shift = lines.T[..., None]  # [depth, 1] each
    no_guesses = torch.zeros(tree.depth, tree.width, dtype=torch.long)
    root = no_guesses.new_zeros(1)
    no_copies = no_guesses.new_zeros(0)
    place = 0
    while place < len(reply.ranks):
        log_p = reply.log_p[place, : tree.depth, : tree.width] * scale + shift
        along = selector.along_paths(log_p.clamp(max=0))
        rows = selector.choose(root, no_guesses, along, no_copies, no_copies.float()).rows
        nodes = set(selector.paths(rows.tolist(), 0))
        ranks = reply.ranks[place]
        depth = next(depth for depth in range(len(ranks), -1, -1) if ranks[:depth] in nodes)
        yield depth
        place += 1 + depth
