"""Files of heads: written, read back, and refused with a reason if they do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_chat.config import UserError
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import read_heads, write_heads
from tests.helpers.tiny import random_heads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from medusa_chat.model.backbone import Backbone

HIDDEN, VOCABULARY = 32, 64


@pytest.fixture
def file(backbone: Backbone, tmp_path: Path) -> Path:
    """Three heads of two blocks with LM heads of their own."""
    return write_heads(random_heads(backbone, 3, layers=2), tmp_path)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_round_trip(backbone: Backbone, tmp_path: Path, heads: int, layers: int, own: bool) -> None:
    made = random_heads(backbone, heads, layers, own).to(torch.bfloat16)  # as files hold them
    file = write_heads(made, tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "medusa_heads" / "medusa_lm_head.safetensors"
    read = read_heads(file, HIDDEN, VOCABULARY).heads
    assert (read.heads, read.layers, read.lm_heads is not None) == (heads, layers, own)
    hidden = torch.randn(5, HIDDEN)
    logits = made.float().logits(hidden, backbone.lm_head)
    assert logits.shape == (heads, 5, VOCABULARY)
    assert torch.equal(read.float().logits(hidden, backbone.lm_head), logits)


def test_heads_are_the_formula_of_the_paper(backbone: Backbone) -> None:
    """x + SiLU(W x + b) block by block, each block with weights of its own, then the LM head."""
    heads = random_heads(backbone, 3, layers=2)
    assert heads.lm_heads is not None
    hidden = torch.randn(4, HIDDEN)
    logits = heads.logits(hidden, backbone.lm_head)
    for head in range(3):
        x = hidden
        for layer in range(2):
            z = x @ heads.weight[layer, head].T + heads.bias[layer, head]
            x = x + z * torch.sigmoid(z)
        assert torch.allclose(logits[head], x @ heads.lm_heads[head].T, atol=1e-4)
    assert not torch.equal(heads.weight[0], heads.weight[1])


def test_new_heads_guess_like_the_lm_head(backbone: Backbone) -> None:
    hidden = torch.randn(4, HIDDEN)
    logits = MedusaHeads(3, 2, HIDDEN).logits(hidden, backbone.lm_head)
    assert torch.allclose(logits, backbone.lm_head(hidden).expand(3, -1, -1), atol=1e-5)


def test_keys_and_shapes_are_those_of_the_official_files(file: Path) -> None:
    tensors = load_file(file)
    expected = {
        f"{h}.{layer}.linear.{kind}"
        for h in range(3)
        for layer in range(2)
        for kind in ("weight", "bias")
    }
    assert set(tensors) == expected | {"0.2.weight", "1.2.weight", "2.2.weight"}
    assert tensors["1.1.linear.weight"].shape == (HIDDEN, HIDDEN)
    assert tensors["1.1.linear.bias"].shape == (HIDDEN,)
    assert tensors["2.2.weight"].shape == (VOCABULARY, HIDDEN)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def _drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def _put(
    name: str, *shape: int, dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(*shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_drop("1.0.linear.weight"), "tensor 1.0.linear.weight is missing"),
        (_drop("2.1.linear.bias"), "tensor 2.1.linear.bias is missing"),
        (_drop("1.2.weight"), "tensor 1.2.weight is missing"),
        (_put("5.0.linear.weight", 32, 32), r"tensor 3.0.linear.weight is missing"),
        (_put("987654321.0.linear.weight", 32, 32), "is missing"),
        (_put("0.987654321.linear.weight", 32, 32), "is missing"),
        (
            _put("1.0.linear.weight", 16, 16),
            r"1.0.linear.weight has shape \[16, 16\], the backbone needs \[32, 32\]",
        ),
        (_put("0.0.linear.bias", 31), r"has shape \[31\]"),
        (
            _put("0.2.weight", 100, 32),
            r"has shape \[100, 32\], the backbone needs \[64, 32\].*another model",
        ),
        (_put("0.1.weight", 64, 32), "LM head 0.1.weight belongs to no head"),
        (_put("7.2.weight", 64, 32), "LM head 7.2.weight belongs to no head"),
        (
            _put("medusa_head.0.0.linear.weight", 32, 32),
            "unknown tensor 'medusa_head.0.0.linear.weight'",
        ),
        (_put("0.0.linear.scale", 1), "unknown tensor"),
        (_put("0.0.linear.weight", 32, 32, dtype=torch.int8), "0.0.linear.weight holds int8"),
    ],
)
def test_what_does_not_fit_is_refused(
    file: Path, change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=complaint) as refusal:
        read_heads(file, HIDDEN, VOCABULARY)
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_damaged_files_are_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    damages = {
        "truncated": whole[:-10],
        "header only": whole[:400],
        "empty": b"",
        "noise": b"\x00\xff" * 500,
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "long header": b"\xff" * 8 + whole[8:],
    }
    for name, content in damages.items():
        damaged = tmp_path / f"{name}.safetensors"
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="cannot read") as refusal:
            read_heads(damaged, HIDDEN, VOCABULARY)
        assert "\n" not in str(refusal.value), name
    with pytest.raises(UserError, match="cannot read"):
        read_heads(tmp_path / "absent.safetensors", HIDDEN, VOCABULARY)
    with pytest.raises(UserError, match="cannot read"):
        read_heads(tmp_path, HIDDEN, VOCABULARY)
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no Medusa heads"):
        read_heads(tmp_path / "none.safetensors", HIDDEN, VOCABULARY)
