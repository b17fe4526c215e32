"""Many texts in one native step: each grows as it would alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from medusa_chat.decoding.native_texts import NativeTexts, choose, continue_texts
from medusa_chat.native.model import NativeModel
from medusa_chat.native.packed import Packed
from medusa_chat.native.step import Team
from tests.helpers.native_library import need_library
from tests.helpers.native_tiny import Native
from tests.helpers.tiny import prompt_ids, random_backbone

need_library()

PROMPTS = [prompt_ids(length, seed=length) for length in (1, 40, 7, 120, 7)]


def packed_backbone(kind: str, weights: str = "float32") -> Any:
    backbone = random_backbone(kind)
    if weights != "float32":
        backbone.model.to(torch.bfloat16)
    backbone.native = Packed(NativeModel(backbone, weights), Team(2), weights)
    return backbone


def alone(backbone: Any, weights: str, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens behind one prompt, by the step over a single text."""
    step = Native(backbone, weights, capacity=len(prompt) + count).step
    found = [int(step.prefill(prompt).argmax())]
    while len(found) < count:
        found.append(int(step.prefill(found[-1:]).argmax()))
    return found


@pytest.mark.parametrize(
    ("kind", "weights"), [("llama", "int8"), ("mistral", "bfloat16"), ("gemma3", "float32")]
)
def test_each_text_goes_on_as_it_does_alone(kind: str, weights: str) -> None:
    backbone = packed_backbone(kind, weights)
    found = continue_texts(backbone, PROMPTS, [], 12, 0.0)
    assert found == [alone(backbone, weights, prompt, 12) for prompt in PROMPTS]
    ends = {ids[3] for ids in found}
    for ids, whole in zip(continue_texts(backbone, PROMPTS, ends, 12, 0.0), found, strict=True):
        stop = next(place for place, token in enumerate(whole) if token in ends)
        assert ids == whole[: stop + 1]


def test_more_texts_than_rows_of_a_step() -> None:
    backbone = packed_backbone("llama")
    prompts = [prompt_ids(3, seed=seed % 7) for seed in range(300)]
    found = continue_texts(backbone, prompts, [], 2, 0.0)
    assert found == [found[seed % 7] for seed in range(300)]
    assert found[0] == alone(backbone, "float32", prompts[0], 2)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    torch.manual_seed(5)
    first = choose(logits, 2.0)
    share = torch.tensor(first).bincount(minlength=3) / len(logits)
    assert torch.allclose(share, (logits[0] / 2).softmax(-1), atol=0.02)
    torch.manual_seed(5)
    assert choose(logits, 2.0) == first
    assert choose(logits, 2.0) != first


def test_rows_outside_of_the_cache_are_refused() -> None:
    texts = NativeTexts(packed_backbone("llama"), 2, 4)
    texts.fill([[1, 2, 3, 4], [5, 6, 7, 8]])
    with pytest.raises(ValueError, match="out of range"):
        texts.extend([1], [3], 0.0)


def test_memory_of_texts_is_free_once_they_are_done() -> None:
    """A cycle would keep gigabytes until Python's collector finds it."""
    backbone = packed_backbone("llama")
    texts = NativeTexts(backbone, 2, 4)
    texts.fill([[1, 2], [3]])
    cache = weakref.ref(texts._step.cache)
    gc.disable()
    try:
        del texts
        assert cache() is None
    finally:
        gc.enable()
