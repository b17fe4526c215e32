"""Heads with a vocabulary or a parent bias, exported to layouts that hold a part of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from medusa_chat.config import ACCURACY_FILE, LAYOUTS, ModelSpec
from medusa_chat.export import writing
from medusa_chat.export.writing import Export, export
from medusa_chat.model.heads import HeadVocabulary, MedusaHeads
from medusa_chat.model.layouts import find_heads, read_heads, write_heads
from medusa_chat.text import size_text
from tests.helpers.complaints import refusal
from tests.helpers.public_layouts import logits_of
from tests.helpers.tiny import END, random_backbone, random_heads, random_model, save_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

H, V = 32, 320
BACKBONE = random_backbone("llama", V)
LM_HEAD = BACKBONE.lm_head.weight.detach()
TOKENS = sorted({*range(100, 180, 2), END})
OTHERS = sorted(set(range(V)) - set(TOKENS))
BIAS_LOST = "the bias by the parent's token, of rank 2, is lost, and so are accuracies"
CUT_LOST = "the heads' vocabulary of 41 tokens is lost, which this layout has no place for"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model("llama", V, pad_token_id=0, eos_token_id=END)
    return save_model(tmp_path_factory.mktemp("base"), model)


def made(own: bool, cut: bool = True, rank: int = 2) -> MedusaHeads:
    vocabulary = HeadVocabulary(torch.tensor(TOKENS), V) if cut else None
    heads = random_heads(BACKBONE, 2, 1, own, vocabulary=vocabulary, parent_bias=rank)
    return heads.bfloat16().float()


def exported(base: Path, folder: Path, heads: MedusaHeads, layout: str) -> list[str]:
    write_heads(heads, folder / "heads")
    spec = ModelSpec("tiny", str(base), heads=str(folder / "heads"))
    return export(spec, Export(layout, folder / "out", dtype="float32"))


def read(folder: Path) -> MedusaHeads:
    file = find_heads(folder)
    assert file is not None
    return read_heads(file, H, V, lm_head=LM_HEAD).heads


def plain_logits(heads: MedusaHeads) -> Tensor:
    """Guesses of heads that share the LM head, for all tokens."""
    whole = MedusaHeads(2, 1, H)
    whole.load_state_dict({"weight": heads.weight, "bias": heads.bias})
    return logits_of(whole, LM_HEAD)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_layout_cannot_hold_is_told_in_a_line(
    base: Path, tmp_path: Path, layout: str, own: bool, cut: bool, rank: int
) -> None:
    heads = made(own, cut, rank)
    if layout == "v2" and own:
        assert "they have LM heads of their own" in refusal(exported, base, tmp_path, heads, layout)
        return
    notices = exported(base, tmp_path, heads, layout)
    found = read(tmp_path / "out")
    assert found.parent_bias is None
    assert (found.vocabulary is not None) is (cut and layout == "vllm")
    assert [BIAS_LOST in line for line in notices].count(True) == (rank > 0)
    assert [CUT_LOST in line for line in notices].count(True) == (cut and layout != "vllm")
    assert all("\n" not in line for line in notices)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (BIAS_LOST in card) is (rank > 0)
    assert (CUT_LOST in card) is (cut and layout != "vllm")
    assert ("| tokens that the heads rank | 41 of 320 |" in card) is (cut and layout == "vllm")


@pytest.mark.parametrize("rank", [0, 2])
def test_accuracies_with_a_bias_do_not_travel_without_it(
    base: Path, tmp_path: Path, rank: int
) -> None:
    figures = tmp_path / "heads" / ACCURACY_FILE
    figures.parent.mkdir()
    figures.write_text(json.dumps({"accuracy": [[0.5, 0.75], [0.25, 0.3]]}))
    exported(base, tmp_path, made(own=True, rank=rank), "vllm")
    assert (tmp_path / "out" / ACCURACY_FILE).exists() is (rank == 0)
    assert ("## Measured" in (tmp_path / "out" / "README.md").read_text()) is (rank == 0)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("v2", "vllm")])
def test_own_lm_heads_get_a_row_for_every_token(base: Path, tmp_path: Path, layout: str) -> None:
    heads = made(own=True)
    exported(base, tmp_path, heads, layout)
    found = read(tmp_path / "out")
    assert found.lm_heads is not None
    assert heads.lm_heads is not None
    assert torch.equal(found.lm_heads[:, TOKENS], heads.lm_heads)
    mean = heads.lm_heads.mean(1, keepdim=True).expand(-1, len(OTHERS), -1)
    torch.testing.assert_close(found.lm_heads[:, OTHERS], mean)
    # The logit of a token that they do not rank is the mean of the others', never among the best.
    best = logits_of(found, LM_HEAD).topk(10).indices.unique()
    assert set(best.tolist()) <= set(TOKENS)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "vllm"])
def test_heads_that_share_the_lm_head_rank_all_of_it(
    base: Path, tmp_path: Path, layout: str
) -> None:
    heads = made(own=False)
    exported(base, tmp_path, heads, layout)
    assert torch.equal(logits_of(read(tmp_path / "out"), LM_HEAD), plain_logits(heads))


@pytest.mark.parametrize("own", [False, True])
def test_vllm_has_the_token_map_and_the_cut_lm_heads(base: Path, tmp_path: Path, own: bool) -> None:
    heads = made(own)
    notices = exported(base, tmp_path, heads, "vllm")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["truncated_vocab_size"]) == (V, len(TOKENS))
    assert config["original_lm_head"] is not own
    tensors = load_file(out / "model.safetensors")
    assert tensors["token_map"].dtype == torch.int64
    assert tensors["token_map"].tolist() == TOKENS
    if own:
        assert heads.lm_heads is not None
        assert torch.equal(tensors["lm_heads.1.weight"], heads.lm_heads[1])
    else:
        assert torch.equal(tensors["lm_head.weight"], LM_HEAD[TOKENS])
        size = size_text(4 * H * len(TOKENS))
        assert any(f"which this layout needs: {size} more" in line for line in notices)
    found = read(out)
    hidden = torch.randn(5, H, generator=torch.Generator().manual_seed(3))
    for given in (heads, found):
        given.requires_grad_(False)
    assert torch.equal(
        found.logits(hidden, BACKBONE.lm_head), heads.logits(hidden, BACKBONE.lm_head)
    )


def test_a_token_map_that_does_not_read_back_is_removed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medusa_chat.model.layouts.write import write_tensors

    def wrong(tensors: dict[str, Tensor], file: Path) -> None:
        write_tensors(tensors | {"token_map": tensors["token_map"] + 1}, file)

    monkeypatch.setattr(writing, "write_tensors", wrong)
    message = refusal(exported, base, tmp_path, made(own=True), "vllm")
    assert "give other logits when they are read back" in message
    assert not (tmp_path / "out").exists()
