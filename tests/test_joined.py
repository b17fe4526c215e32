"""Joined layers give what the layers gave apart, in every kind of weight."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from medusa_chat.model.linear.joined import FusedLinear, Share, _plain_statistics, fuse_linears
from medusa_chat.model.linear.packed import PackedLinear, pack_linears
from medusa_chat.model.linear.quantization import can_pack_4bit, quantization_config
from tests.helpers.tiny import prompt_ids, random_model

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
}  # bitsandbytes takes blocks of 64, tiles of 32
APART = [
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


def quantized(kind: str, quant: Any, folder: Any) -> Any:
    random_model(kind, **SHAPE).save_pretrained(folder)
    config = quantization_config(quant, torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    ).eval()


def linears(model: nn.Module) -> int:
    return sum(
        "Linear" in type(module).__name__ and not isinstance(module, FusedLinear)
        for module in model.modules()
    )


def assert_fusing_changes_nothing(model: Any, tolerance: float) -> None:
    with torch.inference_mode():
        before = [model(text).logits for text in (TEXT, TEXT[:, :1])]
        layers = linears(model)
        assert fuse_linears(model) == 2 * model.config.num_hidden_layers
        assert linears(model) == layers - 3 * model.config.num_hidden_layers
        for text, expected in zip((TEXT, TEXT[:, :1]), before, strict=True):
            torch.testing.assert_close(model(text).logits, expected, rtol=tolerance, atol=tolerance)
    assert fuse_linears(model) == 0


@pytest.mark.parametrize("kind", APART)
def test_plain_layers(kind: str) -> None:
    assert_fusing_changes_nothing(random_model(kind), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_layers_in_bfloat16_packed_after_fusing(kind: str) -> None:
    model = random_model(kind).bfloat16()
    assert_fusing_changes_nothing(model, 0.0)
    with torch.inference_mode():
        before = model(TEXT).logits
        pack_linears(model)
        if any(isinstance(module, PackedLinear) for module in model.modules()):
            assert not any(type(module) is nn.Linear for module in model.modules())
        torch.testing.assert_close(model(TEXT).logits, before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("used", [False, True], ids=["as loaded", "used"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_quantized_layers(kind: str, quant: str, used: bool, tmp_path: Any) -> None:
    """Before and after the first forward, which lays weights out anew."""
    model = quantized(kind, quant, tmp_path)
    if used:
        assert_fusing_changes_nothing(model, 0.0)
        return
    fresh = quantized(kind, quant, tmp_path)
    assert fuse_linears(fresh) == 4
    with torch.inference_mode():
        assert torch.equal(fresh(TEXT).logits, model(TEXT).logits)


@pytest.mark.parametrize("packs", [False, True])
def test_nested_statistics_are_joined_where_packing_ends_them(
    packs: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere they stay apart. Packed, joined layers give exactly what packed ones give apart."""
    model, fresh = (quantized("llama", "nf4-double", tmp_path) for _ in range(2))
    able = all(
        can_pack_4bit(module) for module in model.modules() if type(module).__name__ == "Linear4bit"
    )
    if not packs:
        monkeypatch.setattr("medusa_chat.model.linear.joined.can_pack_4bit", lambda layer: False)
    joined = fuse_linears(fresh)
    assert joined == (4 if packs and able else 0)
    for each in (model, fresh):
        pack_linears(each)
    with torch.inference_mode():
        assert torch.equal(fresh(TEXT).logits, model(TEXT).logits)


def test_scales_without_their_nesting_are_those_that_bitsandbytes_multiplies_by() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, nested = quantize_4bit(torch.randn(64, 256), compress_statistics=True, quant_type="nf4")
    assert nested.nested
    plain = _plain_statistics(nested)
    assert not plain.nested
    assert torch.equal(dequantize_4bit(packed, plain), dequantize_4bit(packed, nested))


@pytest.mark.parametrize("kind", ["phi3", "phi3-sliding"])
def test_models_that_are_joined_already_stay_as_they_are(kind: str) -> None:
    assert fuse_linears(random_model(kind)) == 0


def test_layers_that_differ_stay_apart() -> None:
    for other in (
        nn.Linear(4, 6, bias=False),
        nn.Linear(5, 6),
        nn.Linear(4, 6).bfloat16(),
        nn.Identity(),
    ):
        parent = nn.Module()
        parent.gate_proj, parent.up_proj = nn.Linear(4, 6), other
        assert fuse_linears(parent) == 0
        assert parent.up_proj is other


def test_shares_are_right_whatever_is_asked_for_and_nothing_is_kept() -> None:
    """A layer that reads other rows, as in cross-attention, gets its own product."""
    parts = [nn.Linear(4, width) for width in (6, 2, 2)]
    parent = nn.Module()
    parent.q_proj, parent.k_proj, parent.v_proj = copy.deepcopy(parts)
    assert fuse_linears(parent) == 1
    shares = [parent.q_proj, parent.k_proj, parent.v_proj]
    assert all(isinstance(share, Share) for share in shares)
    one, other = torch.randn(2, 1, 3, 4)
    for order in (
        (0, one),
        (1, other),
        (2, other),
        (2, one),
        (0, one),
        (1, one),
        (1, one),
        (0, other),
    ):
        index, rows = order
        torch.testing.assert_close(shares[index](rows), parts[index](rows))
    for index in range(3):
        shares[index](one)
    assert parent.q_proj.fused._rows is None
    assert not parent.q_proj.fused._shares


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_the_layers_that_were_joined_are_freed_at_once(quant: str) -> None:
    """Weights of bitsandbytes and their layers refer to each other; waiting for a collection would double the model."""
    from medusa_chat.model.linear.quantization import quantize_linear

    parent = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(
            parent,
            name,
            quantize_linear(nn.Linear(64, 64, dtype=torch.bfloat16), quant, torch.device("cpu")),
        )
    old = [weakref.ref(getattr(parent, name).weight) for name in ("q_proj", "k_proj", "v_proj")]
    gc.disable()
    try:
        assert fuse_linears(parent) == 1
        assert [each() for each in old] == [None] * 3
    finally:
        gc.enable()
