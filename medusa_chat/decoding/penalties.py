"""Penalties on tokens that the text holds already, for each node along its own path.

A node's text is the prompt, the reply so far, and the node's ancestors up to itself. Counts of the
text are kept for a whole reply; a step adds a small correction for the ancestors. Shapes: n nodes,
V tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.numbers import single

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.decoding.numbers import Numbers

IN_PROMPT, IN_REPLY = 0, 1  # rows of the counts


def new_counts(vocabulary: int, device: torch.device) -> Tensor:
    """Allocate the counts of a text: float32 [2, V], of the prompt and of the reply."""
    return torch.zeros(2, vocabulary, device=device)


def begin(counts: Tensor, prompt: Sequence[int]) -> None:
    """Count the tokens of a prompt, before an empty reply."""
    counts.zero_()
    _add(counts[IN_PROMPT], prompt)


def extend(counts: Tensor, tokens: Sequence[int]) -> None:
    """Count tokens that the reply has gained."""
    _add(counts[IN_REPLY], tokens)


def _add(counts: Tensor, tokens: Sequence[int]) -> None:
    places = torch.tensor(tokens, dtype=torch.long, device=counts.device)
    counts.index_add_(0, places, torch.ones(len(tokens), device=counts.device))


def penalize(logits: Tensor, counts: Tensor, numbers: Numbers) -> Tensor:
    """Penalize the tokens of the counted text.

    The repetition penalty divides the positive logits of tokens in prompt and reply, and multiplies
    the others (Keskar et al. 2019, CTRL; transformers' RepetitionPenaltyLogitsProcessor). Then the
    logits of the reply's tokens lose the frequency penalty for each occurrence and the presence
    penalty once (OpenAI's API; vLLM's apply_penalties).

    Args:
        logits: float32 [n, V].
        counts: float32 [2, V].
        numbers: of the sampling; its penalties are read.
    """
    return _penalized(logits, counts.sum(0) > 0, counts[IN_REPLY], numbers)


def penalize_paths(
    logits: Tensor, counts: Tensor, numbers: Numbers, candidates: Tensor, ancestors: Tensor
) -> Tensor:
    """Penalize the tokens of the counted text and of each node's path.

    Args:
        logits: float32 [n, V].
        counts: float32 [2, V].
        numbers: of the sampling; its penalties are read.
        candidates: [n], the token of each node.
        ancestors: bool [n, n]; each node is its own ancestor too.
    """
    scores = penalize(logits, counts, numbers)
    same = candidates[:, None] == candidates
    # Occurrences on row r's path of the token of column c.
    on_path = ancestors.float() @ same.float()
    # Columns off the path repeat the node itself, so that each row has n tokens.
    own = torch.where(ancestors, on_path, on_path.diagonal()[:, None])
    tokens = torch.where(ancestors, candidates, candidates[:, None])
    replied = counts[IN_REPLY][tokens] + own
    seen = torch.ones_like(ancestors)
    return scores.scatter(1, tokens, _penalized(logits.gather(1, tokens), seen, replied, numbers))


def _penalized(logits: Tensor, seen: Tensor, replied: Tensor, numbers: Numbers) -> Tensor:
    """Apply the penalties of logits whose tokens were seen, and replied so many times."""
    repetition, presence, frequency = (
        single(number)
        for number in (
            numbers.repetition_penalty,
            numbers.presence_penalty,
            numbers.frequency_penalty,
        )
    )
    repeated = torch.where(logits < 0, logits * repetition, logits / repetition)
    scores = torch.where(seen, repeated, logits)
    return scores - frequency * replied - presence * (replied > 0)
