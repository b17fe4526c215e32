"""How far the heads' own probabilities are to be trusted, and what trees that are chosen by them reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.draft.selection import Selector
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.decoding.trees.growth import dynamic_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medusa_chat.decoding.trees.tree import DynamicTree, NodePath

SUREST = -1e-3  # log p above which a guess counts as no surer: a miss must not cost without bound


@dataclass(frozen=True)
class Guessed:
    """A reply as the heads saw it coming, at each of its tokens but the last.

    Attributes:
        ranks: the ranks at which heads 1, 2, ... held what followed, up to the first that missed or the end.
        log_p: [n, K, WIDTH], natural logarithms of what each head gave its likeliest guesses.
    """

    ranks: list[NodePath]
    log_p: Tensor


def calibrated(
    accuracy: Accuracy,
    replies: Sequence[Guessed],
    begun: Sequence[Sequence[int]],
    sizes: Sequence[int],
) -> Accuracy:
    """Add what makes dynamic trees: the heads' calibration, and the acceptance length at each of `sizes` nodes.

    Args:
        begun: the tokens of each reply at which steps begin. There guessing is harder, as the guesses before missed.
    """
    pairs = [head_pairs(replies, begun, head) for head in range(1, len(accuracy.top) + 1)]
    fitted = replace(accuracy, calibration=tuple(fit(log_p, right) for log_p, right in pairs))
    lengths = {
        nodes: dynamic_length(dynamic_tree(fitted, nodes), fitted, replies) for nodes in sizes
    }
    return replace(
        fitted, dynamic={nodes: length for nodes, length in lengths.items() if length is not None}
    )


def head_pairs(
    replies: Sequence[Guessed], begun: Sequence[Sequence[int]], head: int
) -> tuple[Tensor, Tensor]:
    """Every ranked guess of a head where those of the heads before are right: its log p, and whether it is right."""
    log_p, right = [torch.empty(0)], [torch.empty(0)]
    for reply, places in zip(replies, begun, strict=True):
        for place in places:
            # Behind the last token there is nothing to be right about.
            if len(reply.ranks[place]) < head - 1 or place + head > len(reply.ranks):
                continue
            guesses = reply.log_p[place, head - 1]
            hit = torch.zeros(len(guesses))
            if len(reply.ranks[place]) >= head:
                hit[reply.ranks[place][head - 1]] = 1
            log_p.append(guesses)
            right.append(hit)
    return torch.cat(log_p), torch.cat(right)


def fit(log_p: Tensor, right: Tensor) -> tuple[float, float]:
    """Scale and shift that make min(0, scale * log_p + shift) the likeliest log p of being right; both [m]."""
    if not 0 < right.sum() < len(right):
        return 1.0, 0.0
    with torch.inference_mode(False), torch.enable_grad():
        line = torch.tensor([1.0, 0.0], requires_grad=True)
        optimizer = torch.optim.LBFGS([line], max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            said = (line[0] * log_p + line[1]).clamp(max=SUREST)
            total = -(right * said + (1 - right) * torch.log1p(-said.exp())).mean()
            total.backward()
            return total

        optimizer.step(loss)
    scale, shift = line.tolist()
    return (round(scale, 4), round(shift, 4)) if 0 < scale < 100 else (1.0, 0.0)


def dynamic_length(
    tree: DynamicTree, accuracy: Accuracy, replies: Sequence[Guessed]
) -> float | None:
    """Tokens a step that greedy decoding with a dynamic tree has over these replies; None for no step."""
    tokens = [1 + depth for reply in replies for depth in _depths_reached(tree, accuracy, reply)]
    return sum(tokens) / len(tokens) if tokens else None


@torch.inference_mode()
def _depths_reached(tree: DynamicTree, accuracy: Accuracy, reply: Guessed) -> Iterator[int]:
    selector = Selector(tree.superset, len(tree), 0, reply.log_p.device)
    lines = torch.tensor([accuracy.calibration_of(head) for head in range(1, tree.depth + 1)]).view(
        -1, 2, 1
    )
    none = torch.zeros(tree.depth, tree.width, dtype=torch.long)
    root, chain, place = none.new_zeros(1), none.new_zeros(0), 0
    while place < len(reply.ranks):
        said = reply.log_p[place, : tree.depth, : tree.width] * lines[:, 0] + lines[:, 1]
        rows = selector.choose(
            root, none, selector.along_paths(said.clamp(max=0)), chain, chain.float()
        ).rows
        nodes = set(selector.paths(rows.tolist(), 0))
        ranks = reply.ranks[place]
        depth = next(depth for depth in range(len(ranks), -1, -1) if ranks[:depth] in nodes)
        yield depth
        place += 1 + depth
