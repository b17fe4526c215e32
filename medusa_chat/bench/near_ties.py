"""Tell a near-tie of two tokens from a fault, by the gap that rounding explains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medusa_chat.decoding import penalties
from medusa_chat.decoding.acceptance import temper, truncate
from medusa_chat.decoding.noise import gumbel
from medusa_chat.decoding.numbers import Numbers
from medusa_chat.model.attention.tree_attention import chain_mask
from medusa_chat.model.linear.quantization import quant_of

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.sampling import Sampling

ULPS = 16  # a gap of so many units in the last place may be rounding
NOISE_FACTOR = 4  # so may one of so many times the noise of a quantized model
REPLAYED_TOKENS = 32  # tokens that are run row by row to measure that noise


@torch.inference_mode()
def peer_gap(
    model: Any, prompt: list[int], reply: list[int], a: int, b: int, sampling: Sampling
) -> tuple[float, float]:
    """Measure the gap between two tokens as transformers' `model` scores them after a text.

    Args:
        model: of transformers.
        prompt: the text's beginning.
        reply: its end, which was generated.
        a: one token.
        b: the other one.
        sampling: its penalties count.

    Returns:
        The gap of their logits, and the largest gap that rounding explains.
    """
    ids = torch.tensor([prompt + reply], device=model.device)
    last = model(input_ids=ids, use_cache=False).logits[0, -1:].float()
    limit = ULPS * torch.finfo(model.dtype).eps * float(last.abs().max()) * _factor(sampling)
    last = _penalized(last, prompt, reply, sampling)[0]
    return abs(float(last[a] - last[b])), limit


@torch.inference_mode()
def score_gap(
    engine: Engine, prompt: list[int], reply: list[int], a: int, b: int, sampling: Sampling
) -> tuple[float, float]:
    """Measure the gap between the scores of tokens `a` and `b` after a prompt and a reply to it.

    Returns:
        The gap, and the largest gap that rounding explains.
    """
    backbone = engine.backbone
    text = prompt + reply
    hidden = backbone.hidden_of_text(torch.tensor(text, device=backbone.device))
    logits = backbone.logits(hidden[-1:]).float()  # [1, V]
    noise = row_noise(backbone, text)
    limit = explained_gap(backbone, noise, float(logits.abs().max())) * _factor(sampling)
    noise *= _factor(sampling)
    logits = _penalized(logits, prompt, reply, sampling)
    if sampling.greedy:
        return abs(float(logits[0, a] - logits[0, b])), limit
    limit /= sampling.temperature
    if any(at_an_edge(logits, token, sampling, NOISE_FACTOR * noise) for token in (a, b)):
        return limit, limit
    scores = temper(logits, sampling.temperature)
    position = torch.tensor([len(text)], device=scores.device)
    scores = scores + gumbel(sampling.seed, position, scores.shape[-1])
    return abs(float(scores[0, a] - scores[0, b])), limit


def _penalized(logits: Tensor, prompt: list[int], reply: list[int], sampling: Sampling) -> Tensor:
    """Apply a sampling's penalties to the logits [1, V] after a prompt and a reply."""
    if not sampling.penalized:
        return logits
    counts = penalties.new_counts(logits.shape[-1], logits.device)
    penalties.begin(counts, prompt)
    penalties.extend(counts, reply)
    return penalties.penalize(logits, counts, Numbers.of(sampling))


def _factor(sampling: Sampling) -> float:
    """Tell how many times larger a sampling's repetition penalty can make an error of a logit."""
    return max(sampling.repetition_penalty, 1 / sampling.repetition_penalty)


def explained_gap(backbone: Backbone, noise: float, largest: float) -> float:
    """Largest gap between two logits that rounding explains.

    Kernels of quantized layers give results that depend on the number of rows by more than the
    dtype shows. For them the measured noise (`row_noise`) counts, up to a limit in bfloat16 units.
    `largest` is the largest absolute logit.
    """
    unit = torch.finfo(backbone.dtype).eps * largest
    if not quant_of(backbone.model.config):
        return ULPS * unit
    highest = ULPS * torch.finfo(torch.bfloat16).eps * largest
    return min(max(NOISE_FACTOR * noise, 2 * unit), highest)


def row_noise(backbone: Backbone, text: list[int]) -> float:
    """Largest difference of a logit between all rows at once and the last rows one by one."""
    tokens = torch.tensor(text, device=backbone.device)
    positions = torch.arange(len(text), device=backbone.device)
    start = max(len(text) - REPLAYED_TOKENS, 0)
    together = backbone.logits(backbone.hidden_of_text(tokens)[start:]).float()
    cache = backbone.new_cache(len(text))
    if start:
        mask = chain_mask(start, backbone.dtype, backbone.device)
        backbone.hidden(tokens[:start], positions[:start], mask, cache)
        cache.commit(tuple(range(start)))
    noise = 0.0
    for i in range(start, len(text)):
        row = slice(i, i + 1)
        alone = backbone.logits(backbone.hidden(tokens[row], positions[row], None, cache))
        cache.commit((0,))
        noise = max(noise, float((alone[0].float() - together[i - start]).abs().max()))
    return noise


def at_an_edge(logits: Tensor, token: int, sampling: Sampling, noise: float) -> bool:
    """Tell if noise may move a token across the edge of top-p, top-k or min-p. logits: [1, V]."""
    kept = []
    for change in (-noise, noise):
        rounded = logits.clone()
        rounded[0, token] += change
        scores = temper(rounded, sampling.temperature)
        scores = truncate(scores, *Numbers.of(sampling)[1:4])
        kept.append(bool(scores[0, token].isfinite()))
    return kept[0] != kept[1]
