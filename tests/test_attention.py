"""Tree attention against the textbook in float64: groups, softcap, windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    GptOssConfig,
)

from medusa_chat.config import UserError
from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.model.attention.tree_attention import (
    additive,
    chain_mask,
    full_mask,
    tree_attention,
    windowed,
)
from medusa_chat.model.backbone import Backbone
from tests.helpers.tiny import SMALL, prompt_ids, random_backbone, random_model, random_tree


def textbook(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attend one head and one row at a time.

    query [heads, n, d]; key, value [kv_heads, T, d]; allowed [n, T].
    """
    heads, rows, _ = query.shape
    mixed = torch.zeros(rows, heads, value.shape[-1], dtype=torch.float64)
    for head in range(heads):
        shared = head // (heads // key.shape[0])
        for row in range(rows):
            seen = allowed[row].nonzero().flatten()
            scores = key[shared, seen].double() @ query[head, row].double() * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            mixed[row, head] = scores.softmax(0) @ value[shared, seen].double()
    return mixed


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("length", [0, 9])
def test_tree_attention_is_the_textbook(
    softcap: float | None, kv_heads: int, window: int | None, length: int
) -> None:
    heads, size = 6, 8
    tree = random_tree(kv_heads, nodes=12, depth=4, width=3, spine=3)
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(1, heads, len(tree), size, generator=generator)
    key, value = torch.randn(2, 1, kv_heads, length + len(tree), size, generator=generator)
    mask = full_mask(
        additive(TreeTensors.of(tree, torch.device("cpu")).ancestors, torch.float32), length
    )
    positions = torch.tensor(tree.depths) + length
    if window:
        mask = windowed(mask, positions, length, window)
    allowed = torch.zeros(len(tree), length + len(tree), dtype=torch.bool)
    for row, branch in enumerate(tree.branches):
        for place in [*range(length), *(length + node for node in branch)]:
            position = place if place < length else length + tree.depths[place - length]
            allowed[row, place] = window is None or position > length + tree.depths[row] - window
    ours, _ = tree_attention(
        torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=softcap
    )
    assert torch.allclose(
        ours[0].double(), textbook(query[0], key[0], value[0], allowed, 0.3, softcap), atol=1e-5
    )


def test_a_single_row_needs_no_mask() -> None:
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    ours, _ = tree_attention(torch.nn.Module(), query, key, value, None, scaling=1.0)
    assert torch.allclose(
        ours[0].double(),
        textbook(query[0], key[0], value[0], torch.ones(1, 5), 1.0, None),
        atol=1e-5,
    )


def test_attention_sinks_are_refused() -> None:
    one = torch.randn(1, 1, 1, 4)
    with pytest.raises(ValueError, match="sinks"):
        tree_attention(torch.nn.Module(), one, one, one, None, scaling=1.0, s_aux=torch.zeros(1))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "qwen3-mixed"])
def test_tree_rows_equal_a_forward_over_each_branch(kind: str) -> None:
    """A node's hidden state is that of the text that its path spells, after a text longer than the
    window.
    """
    model = random_model(kind)
    model.set_attn_implementation("eager")
    text = prompt_ids(30)
    tree = random_tree(2, nodes=14, depth=4, width=3, spine=3)
    guesses = prompt_ids(len(tree), seed=5)
    with torch.inference_mode():
        plain = [
            model(torch.tensor([[*text, *(guesses[node] for node in branch)]])).logits[0, -1]
            for branch in tree.branches
        ]
    backbone = random_backbone(kind)
    cache = backbone.new_cache(64)
    with torch.inference_mode():
        chain = chain_mask(30, torch.float32, torch.device("cpu"))
        backbone.hidden(torch.tensor(text), torch.arange(30), chain, cache)
        cache.commit(tuple(range(30)))
        mask = additive(TreeTensors.of(tree, torch.device("cpu")).ancestors, torch.float32)
        hidden = backbone.hidden(torch.tensor(guesses), torch.tensor(tree.depths) + 30, mask, cache)
        ours = backbone.logits(hidden)
    for node, expected in enumerate(plain):
        assert torch.allclose(ours[node], expected, atol=2e-4), f"node {tree.paths[node]}"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_plain_forward_stays_causal_under_our_attention(kind: str) -> None:
    """transformers gives an unknown attention function no mask; ours registers one."""
    text = torch.tensor([prompt_ids(30), prompt_ids(30, seed=1)])
    model = random_model(kind)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(text).logits
        ours = random_backbone(kind).model(text).logits
    assert torch.allclose(ours, expected, atol=2e-4)


def test_hidden_of_text_is_a_forward_of_its_own() -> None:
    backbone, text = random_backbone("gemma3"), prompt_ids(40)
    model = random_model("gemma3")
    with torch.inference_mode():
        logits = backbone.logits(backbone.hidden_of_text(torch.tensor(text)))
        assert torch.allclose(logits, model(torch.tensor([text])).logits[0], atol=2e-4)


WRONG_MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt_oss": (GptOssConfig, {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    "cohere": (CohereConfig, {}),
}


@pytest.mark.parametrize("kind", WRONG_MODELS)
def test_models_that_would_give_wrong_text_are_refused(kind: str) -> None:
    config_class, own = WRONG_MODELS[kind]
    refuse(config_class(**(SMALL | {"vocab_size": 64} | own)))


def test_a_model_without_rotary_positions_is_refused() -> None:
    refuse(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64))


def refuse(config: Any) -> None:
    with pytest.raises(UserError, match=f"{config.model_type} models") as refusal:
        Backbone(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(refusal.value)
