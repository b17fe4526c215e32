"""Joined layers give the same outputs as separate ones, for every kind of weight."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from medusa_chat.model.linear.joined import JoinedLinear, Share, join_linears, plain_statistics
from medusa_chat.model.linear.packed import PackedLinear, pack_linears
from medusa_chat.model.linear.quantization import (
    can_pack_4bit,
    quantization_config,
    quantize_linear,
)
from tests.helpers.tiny import prompt_ids, random_model

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.config import Quant

# bitsandbytes takes blocks of 64, and tiles of 32.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SEPARATE = [
    "llama",
    "llama-wide-heads",
    "mistral",
    "qwen2",
    "qwen2-mixed",
    "qwen3",
    "gemma2",
    "gemma3",
]
TEXT = torch.tensor([prompt_ids(30)])


def quantized(kind: str, quant: str, folder: Path) -> Any:
    random_model(kind, **SHAPE).save_pretrained(folder)
    config = quantization_config(quant, torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    ).eval()


def linears(model: nn.Module) -> int:
    return sum(
        "Linear" in type(module).__name__ and not isinstance(module, JoinedLinear)
        for module in model.modules()
    )


def assert_joining_changes_nothing(model: Any, tolerance: float) -> None:
    with torch.inference_mode():
        before = [model(text).logits for text in (TEXT, TEXT[:, :1])]
        layers = linears(model)
        assert join_linears(model) == 2 * model.config.num_hidden_layers
        assert linears(model) == layers - 3 * model.config.num_hidden_layers
        for text, expected in zip((TEXT, TEXT[:, :1]), before, strict=True):
            torch.testing.assert_close(model(text).logits, expected, rtol=tolerance, atol=tolerance)
    assert join_linears(model) == 0


@pytest.mark.parametrize("kind", SEPARATE)
def test_plain_layers(kind: str) -> None:
    assert_joining_changes_nothing(random_model(kind), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_layers_in_bfloat16_packed_after_joining(kind: str) -> None:
    model = random_model(kind).bfloat16()
    assert_joining_changes_nothing(model, 0.0)
    with torch.inference_mode():
        before = model(TEXT).logits
        pack_linears(model)
        if any(isinstance(module, PackedLinear) for module in model.modules()):
            assert not any(type(module) is nn.Linear for module in model.modules())
        torch.testing.assert_close(model(TEXT).logits, before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("used", [False, True], ids=["as loaded", "used"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_quantized_layers(kind: str, quant: str, used: bool, tmp_path: Path) -> None:
    """Before and after the first forward, which lays weights out again."""
    model = quantized(kind, quant, tmp_path)
    if used:
        assert_joining_changes_nothing(model, 0.0)
        return
    fresh = quantized(kind, quant, tmp_path)
    assert join_linears(fresh) == 4
    with torch.inference_mode():
        assert torch.equal(fresh(TEXT).logits, model(TEXT).logits)


@pytest.mark.parametrize("packs", [False, True])
def test_nested_statistics_are_joined_where_packing_ends_them(
    packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere they stay separate. Once packed, joined layers give exactly the same outputs."""
    model, fresh = (quantized("llama", "nf4-double", tmp_path) for _ in range(2))
    able = all(
        can_pack_4bit(module) for module in model.modules() if type(module).__name__ == "Linear4bit"
    )
    if not packs:
        monkeypatch.setattr("medusa_chat.model.linear.joined.can_pack_4bit", lambda _layer: False)
    joined = join_linears(fresh)
    assert joined == (4 if packs and able else 0)
    for each in (model, fresh):
        pack_linears(each)
    with torch.inference_mode():
        assert torch.equal(fresh(TEXT).logits, model(TEXT).logits)


def test_scales_without_nesting_are_those_that_bitsandbytes_multiplies_by() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, nested = quantize_4bit(torch.randn(64, 256), compress_statistics=True, quant_type="nf4")
    assert nested.nested
    plain = plain_statistics(nested)
    assert not plain.nested
    assert torch.equal(dequantize_4bit(packed, plain), dequantize_4bit(packed, nested))


@pytest.mark.parametrize("kind", ["phi3", "phi3-sliding"])
def test_models_that_are_joined_already_stay_as_they_are(kind: str) -> None:
    assert join_linears(random_model(kind)) == 0


def test_layers_that_differ_stay_apart() -> None:
    for other in (
        nn.Linear(4, 6, bias=False),
        nn.Linear(5, 6),
        nn.Linear(4, 6).bfloat16(),
        nn.Identity(),
    ):
        parent = nn.Module()
        parent.gate_proj, parent.up_proj = nn.Linear(4, 6), other
        assert join_linears(parent) == 0
        assert parent.up_proj is other


def attention_layers() -> tuple[list[nn.Linear], list[Any]]:
    """Return three layers, and the shares of a copy of them."""
    parts = [nn.Linear(4, width) for width in (6, 2, 2)]
    parent = nn.Module()
    parent.q_proj, parent.k_proj, parent.v_proj = copy.deepcopy(parts)
    assert join_linears(parent) == 1
    shares: list[Any] = [parent.q_proj, parent.k_proj, parent.v_proj]
    assert all(isinstance(share, Share) for share in shares)
    return parts, shares


def test_shares_are_right_in_any_order() -> None:
    """A layer that reads other rows, as in cross-attention, gets its own product."""
    parts, shares = attention_layers()
    first, second = torch.randn(2, 1, 3, 4)
    calls = [
        (0, first),
        (1, second),
        (2, second),
        (2, first),
        (0, first),
        (1, first),
        (1, first),
        (0, second),
    ]
    for index, rows in calls:
        torch.testing.assert_close(shares[index](rows), parts[index](rows))


def test_nothing_is_kept_once_each_layer_has_its_share() -> None:
    _, shares = attention_layers()
    rows = torch.randn(1, 3, 4)
    for share in shares:
        share(rows)
    kept = weakref.ref(rows)
    del rows
    assert kept() is None


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_the_layers_that_were_joined_are_freed_at_once(quant: Quant) -> None:
    """bitsandbytes' weights and layers refer to each other. Waiting for a collection would double
    the model.
    """
    parent = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = nn.Linear(64, 64, dtype=torch.bfloat16)
        setattr(parent, name, quantize_linear(linear, quant, torch.device("cpu")))
    old = [weakref.ref(getattr(parent, name).weight) for name in ("q_proj", "k_proj", "v_proj")]
    gc.disable()
    try:
        assert join_linears(parent) == 1
        assert [each() for each in old] == [None] * 3
    finally:
        gc.enable()
