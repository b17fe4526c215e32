"""Our own files of heads hold a vocabulary and a bias by the parent's token too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medusa_chat.config import LoadOptions, ModelSpec
from medusa_chat.model.heads import HeadVocabulary, LinearHeads, MedusaHeads, decoding_heads
from medusa_chat.model.layouts import OWN_HEADS, find_heads, read_heads, write_heads
from medusa_chat.model.loading import load_model
from tests.helpers.complaints import refusal
from tests.helpers.tiny import random_backbone, random_heads, random_model, save_model

if TYPE_CHECKING:
    from pathlib import Path

H, V, RANK = 32, 64, 3
BACKBONE = random_backbone()
TOKENS = [5, 2, 3, 40, 63, 17, 0]
HIDDEN = torch.randn(5, H, generator=torch.Generator().manual_seed(3))


def made(own: bool, cut: bool = True, rank: int = RANK, heads: int = 3) -> MedusaHeads:
    """Random heads whose weights are numbers of bfloat16, as a file has them."""
    vocabulary = HeadVocabulary(torch.tensor(TOKENS), V) if cut else None
    random = random_heads(BACKBONE, heads, 2, own, vocabulary=vocabulary, parent_bias=rank)
    return random.bfloat16().float()


def test_a_vocabulary_is_sorted_and_knows_the_row_of_each_token() -> None:
    vocabulary = HeadVocabulary(torch.tensor(TOKENS), V)
    assert len(vocabulary) == 7
    assert vocabulary.tokens.tolist() == sorted(TOKENS)
    for token in range(V):
        expected = sorted(TOKENS).index(token) if token in TOKENS else 7
        assert int(vocabulary.rows[token]) == expected


def test_a_new_bias_is_zero_and_drawn_from_torchs_generator() -> None:
    torch.manual_seed(4)
    heads = MedusaHeads(2, 1, H, V, parent_bias=RANK)
    torch.manual_seed(4)
    bias = MedusaHeads(2, 1, H, parent_bias=RANK, size=V).parent_bias
    assert heads.parent_bias is not None
    assert bias is not None
    assert torch.equal(bias.first, heads.parent_bias.first)
    assert (bias.first.std() - 0.02).abs() < 0.005
    assert (bias.first.shape, bias.second.shape) == ((V, RANK), (V, RANK))
    assert not bias(torch.arange(V)).any()
    assert MedusaHeads(2, 1, H, V).parent_bias is None


@pytest.mark.parametrize("cut", [False, True])
def test_the_bias_is_a_product_of_the_parents_row(cut: bool) -> None:
    bias = made(own=True, cut=cut).parent_bias
    assert bias is not None
    parents = torch.tensor([[2, 63, 1], [0, 5, 62]])
    found = bias(parents)
    assert found.shape == (2, 3, 7 if cut else V)
    for place, parent in zip(found.flatten(0, 1), parents.flatten().tolist(), strict=True):
        row = parent
        if cut:
            row = sorted(TOKENS).index(parent) if parent in TOKENS else 7
        expected = torch.stack([second.dot(bias.first[row]) for second in bias.second])
        torch.testing.assert_close(place, expected)


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_files_hold_both(tmp_path: Path, own: bool, cut: bool, rank: int) -> None:
    heads = made(own, cut, rank)
    file = write_heads(heads, tmp_path)
    assert find_heads(tmp_path) == file
    found = read_heads(file, H, V)
    assert found.notices == ()
    before, after = heads.state_dict(), found.heads.float().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lm_head = BACKBONE.lm_head
    assert torch.equal(found.heads.logits(HIDDEN, lm_head), heads.logits(HIDDEN, lm_head))
    tensors = load_file(file)
    assert ("token_map" in tensors) is cut
    assert tensors["0.0.linear.weight"].dtype == torch.bfloat16
    again = write_heads(found.heads, tmp_path / "again")
    assert again.read_bytes() == file.read_bytes()


def test_heads_that_share_the_lm_head_rank_its_rows() -> None:
    whole, cut = made(own=False, cut=False), made(own=False)
    expected = whole.logits(HIDDEN, BACKBONE.lm_head)[..., sorted(TOKENS)]
    torch.testing.assert_close(cut.logits(HIDDEN, BACKBONE.lm_head), expected)

    class Quantized(nn.Module):
        out_features = V

        def forward(self, hidden: Tensor) -> Tensor:
            logits: Tensor = BACKBONE.lm_head(hidden)
            return logits

    torch.testing.assert_close(cut.logits(HIDDEN, Quantized()), expected)


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_decode_keep_both(own: bool, quant: str, dtype: torch.dtype) -> None:
    plain, given = made(own).to(dtype), made(own)
    backbone = random_backbone()
    lm_head = backbone.lm_head.to(dtype)
    expected = plain.logits(HIDDEN.to(dtype), lm_head)
    heads = decoding_heads(given, quant, torch.device("cpu"), dtype, lm_head)  # type: ignore[arg-type]
    assert heads.vocabulary is not None
    assert heads.vocabulary.tokens.tolist() == sorted(TOKENS)
    assert heads.parent_bias is not None
    assert heads.parent_bias.first.dtype == dtype
    parents = torch.arange(V)
    assert plain.parent_bias is not None
    assert torch.equal(heads.parent_bias(parents), plain.parent_bias(parents))
    if not own:
        assert isinstance(heads, LinearHeads)
        assert heads.lm_head is not None
    lm_head.weight.data.zero_()  # the copy is the heads' own
    found = heads.logits(HIDDEN.to(dtype), lm_head)
    assert found.shape == (3, 5, 7)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < {"none": 0.02, "int8": 0.05, "nf4": 0.6}[quant]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("own", [False, True])
def test_a_model_loads_with_both(own: bool, dtype: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", random_model(vocabulary=260))
    vocabulary = HeadVocabulary(torch.tensor(TOKENS), 260)
    backbone = random_backbone(vocabulary=260)
    heads = random_heads(backbone, 3, own=own, vocabulary=vocabulary, parent_bias=RANK).bfloat16()
    write_heads(heads, tmp_path / "heads")
    spec = ModelSpec("tiny", str(folder), heads=str(tmp_path / "heads"))
    loaded = load_model(spec, LoadOptions(device="cpu", dtype=dtype, engine="torch"))  # type: ignore[arg-type]
    assert loaded.notices == ()
    assert isinstance(loaded.heads, MedusaHeads | LinearHeads)
    assert loaded.heads.vocabulary is not None
    assert loaded.heads.vocabulary.tokens.tolist() == sorted(TOKENS)
    assert loaded.heads.parent_bias is not None
    hidden = HIDDEN.to(loaded.backbone.dtype)
    found = loaded.heads.logits(hidden, loaded.backbone.lm_head)
    plain = heads.to(hidden.dtype).logits(hidden, backbone.lm_head.to(hidden.dtype))
    torch.testing.assert_close(found, plain, rtol=0.02, atol=0.3 if dtype == "bfloat16" else 1e-4)
    parents = torch.arange(260)
    assert heads.parent_bias is not None
    torch.testing.assert_close(loaded.heads.parent_bias(parents), heads.parent_bias(parents))


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "a rank of zero": ({"parent_bias.first": torch.zeros(8, 0)}, r"not \[tokens, rank\]"),
    "one dimension": ({"parent_bias.first": torch.zeros(8)}, r"not \[tokens, rank\]"),
    "parents of another vocabulary": (
        {"parent_bias.first": torch.zeros(V, RANK)},
        r"parent_bias.first has shape \[64, 3\], the backbone needs \[8, 3\]",
    ),
    "two ranks": (
        {"parent_bias.second": torch.zeros(7, 4)},
        r"parent_bias.second has shape \[7, 4\], the backbone needs \[7, 3\]",
    ),
    "NaN": ({"parent_bias.second": torch.full((7, RANK), torch.nan)}, "holds NaN"),
    "integers": (
        {"parent_bias.first": torch.zeros(8, RANK, dtype=torch.int32)},
        "holds int32, not numbers",
    ),
    "an id out of range": ({"token_map": torch.tensor([*TOKENS[:6], V])}, "or beyond the backb"),
    "a negative id": ({"token_map": torch.tensor([*TOKENS[:6], -1])}, "or beyond the backbone's"),
    "an id twice": ({"token_map": torch.tensor([*TOKENS[:6], 5])}, "names tokens twice"),
    "no ids": ({"token_map": torch.zeros(0, dtype=torch.long)}, "not a list of token ids"),
    "ids that are no integers": ({"token_map": torch.zeros(7)}, "not a list of token ids"),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    changes, reason = WRONG[name]
    file = write_heads(made(own=True), tmp_path)
    save_file(load_file(file) | changes, file, {"format": "pt"})
    check_refused(file, reason)


def test_a_token_map_of_other_rows_is_refused(tmp_path: Path) -> None:
    file = write_heads(made(own=True, rank=0), tmp_path)
    tensors = load_file(file) | {"token_map": torch.tensor(TOKENS[:6])}
    save_file(tensors, file, {"format": "pt"})
    check_refused(file, "has 7 rows, token_map names 6 tokens")


@pytest.mark.parametrize("name", ["parent_bias.first", "parent_bias.second"])
def test_half_a_bias_is_refused(tmp_path: Path, name: str) -> None:
    file = write_heads(made(own=False), tmp_path)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    check_refused(file, f"tensor {name} is missing")


def check_refused(file: Path, reason: str) -> None:
    message = refusal(read_heads, file, H, V)
    assert re.search(reason, message), message
    assert str(file) in message
    assert OWN_HEADS in message
    assert "\n" not in message
