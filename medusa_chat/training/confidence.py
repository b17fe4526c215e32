"""Calibration of the heads' probabilities, and the acceptance length of dynamic trees."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from medusa_chat.decoding.draft.dynamic import DynamicDraft
from medusa_chat.decoding.draft.ranking import Candidates
from medusa_chat.decoding.report import PackedInput, StepInput
from medusa_chat.decoding.trees.growth import dynamic_tree
from medusa_chat.training.observations import scores_along

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from medusa_chat.decoding.draft.base import Guessing
    from medusa_chat.decoding.draft.ranking import Ranker
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.decoding.trees.tree import DynamicTree
    from medusa_chat.training.observations import Guessed, Observed

HIGHEST_LOG_P = -1e-3  # so that one wrong guess has a bounded cost


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


def coupling_weights(
    replies: Sequence[Observed], ranker: Ranker, vocabulary: int
) -> tuple[tuple[float, float], ...]:
    """Weigh each head's tempered log p and the noise so that right guesses are likeliest."""
    scored = [scores_along(reply, ranker, vocabulary) for reply in replies]
    heads = scored[0].right.shape[1]
    return tuple(
        fit_coupling(
            torch.cat([reply.log_p[:, head] for reply in scored]),
            torch.cat([reply.noise[:, head] for reply in scored]),
            torch.cat([reply.right[:, head] for reply in scored]),
        )
        for head in range(heads)
    )


def fit_coupling(log_p: Tensor, noise: Tensor, right: Tensor) -> tuple[float, float]:
    """Fit two weights so that softmax(a * log_p + b * noise) is the chance of each guess.

    log_p: [m, C], tempered. noise: [m, C]. right: [m], the place of the right guess; -1 for none,
    which does not count.
    """
    known = right >= 0
    if not known.any():
        return 1.0, 1.0
    log_p, noise, right = log_p[known], noise[known], right[known]

    def loss(weights: Tensor) -> Tensor:
        return functional.cross_entropy(weights[0] * log_p + weights[1] * noise, right)

    of_log_p, of_noise = minimized(loss, [1.0, 1.0])
    if not (0 < of_log_p < 100 and of_noise < 100):
        return 1.0, 1.0
    return round(of_log_p, 4), round(max(of_noise, 0.0), 4)


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

    def loss(line: Tensor) -> Tensor:
        fitted = (line[0] * log_p + line[1]).clamp(max=HIGHEST_LOG_P)
        return -(right * fitted + (1 - right) * torch.log1p(-fitted.exp())).mean()

    scale, shift = minimized(loss, [1.0, 0.0])
    return (round(scale, 4), round(shift, 4)) if 0 < scale < 100 else (1.0, 0.0)


def minimized(loss: Callable[[Tensor], Tensor], start: list[float]) -> list[float]:
    """Find numbers near `start` that make a loss least."""
    with torch.inference_mode(False), torch.enable_grad():
        numbers = torch.tensor(start, requires_grad=True)
        optimizer = torch.optim.LBFGS([numbers], max_iter=60, line_search_fn="strong_wolfe")

        def step() -> float:
            optimizer.zero_grad()
            total = loss(numbers)
            total.backward()
            return total.item()

        optimizer.step(step)
    return [float(number) for number in numbers.detach()]


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
