"""The native step: a row is the same bit for bit whatever runs beside it; heads, acceptance."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import medusa_chat
from medusa_chat.decoding.acceptance import TreeTensors, greedy
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.linear.quantization import quantize_linear
from medusa_chat.native.library import load
from medusa_chat.native.model import NativeModel
from medusa_chat.native.rows import FixedRows
from medusa_chat.native.step import NativeStep, Team
from tests.helpers.native_library import need_library
from tests.helpers.native_tiny import Native, backbone_of, path_to, random_parents, shape
from tests.helpers.tiny import ARCHITECTURES, prompt_ids, random_heads, random_tree

need_library()

BUNDLED = str(Path(medusa_chat.__file__).parent / "bundled")
FORMATS = ("float32", "bfloat16", "int8", "nf4")


def check_rows(backbone: Any, weights: Any, threads: Any, seed: Any) -> None:
    """Every row of a random tree against its path alone, behind texts put in in other splits."""
    chance = random.Random(seed)
    tokens = prompt_ids(chance.randint(1, 50), backbone.vocabulary, seed)
    count = chance.choice([2, 3, 5, 9, 17, 40])
    rows, parents = prompt_ids(count, backbone.vocabulary, seed + 1), random_parents(count, seed)
    native = Native(backbone, weights, threads)
    native.text(tokens, seed)
    hidden, logits = native.tree(rows, parents)
    other = Native(backbone, weights, 1 + seed % 3)
    other.text(tokens, seed + 7)
    for row in chance.sample(range(count), min(count, 6)):
        path = [rows[each] for each in path_to(row, parents)]
        alone = other.tree(path, None)
        assert torch.equal(hidden[row], alone[0][-1])
        assert torch.equal(logits[row], alone[1][-1])
    other.text(tokens + path, seed + 9)
    assert torch.equal(other.step.last[0], hidden[row])


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_rows_beside_it(weights: Any, threads: Any) -> None:
    backbone = backbone_of("llama", weights)
    for seed in range(8):
        check_rows(backbone, weights, threads, 10 * threads + seed)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nor_in_any_family(kind: str, weights: Any) -> None:
    for seed in range(3):
        check_rows(backbone_of(kind, weights), weights, 2, seed)


SIZES = {
    "heads of 80": shape(1, 1, 80, 80),
    "heads of 96": shape(3, 1, 96, 96),
    "vocabulary 4,097": {"head_dim": 64, "vocabulary": 4097},
    "heads of 128": shape(5, 1, 128, 40),
}


@pytest.mark.parametrize("size", SIZES)
def test_nor_in_odd_sizes(size: Any) -> None:
    backbone = backbone_of("llama", "int8", **SIZES[size])
    for seed in range(3):
        check_rows(backbone, "int8", 3, seed)


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx2vnni", "arm"])
def test_nor_on_any_processor(variant: str) -> None:
    best = load().mc_variant()
    if load().mc_use(variant.encode()):
        pytest.skip(f"this processor does not run {variant}")
    try:
        for weights in FORMATS:
            backbone = backbone_of("gemma2", weights)
            for seed in range(3):
                check_rows(backbone, weights, 2, seed)
    finally:
        load().mc_use(best)


@pytest.mark.parametrize("weights", FORMATS)
def test_long_texts_and_many_rows(weights: Any) -> None:
    backbone = backbone_of("llama", weights)
    tokens, rows = prompt_ids(300), prompt_ids(256, seed=1)
    parents = random_parents(256, 5)
    native, other = (Native(backbone, weights, threads, 600) for threads in (2, 1))
    native.text(tokens)
    other.text(tokens, seed=3)
    hidden, _ = native.tree(rows, parents)
    for row in (0, 3, 100, 255):
        path = [rows[each] for each in path_to(row, parents)]
        assert torch.equal(other.tree(path, None)[0][-1], hidden[row])


def test_the_likeliest_token_is_that_of_the_logits() -> None:
    backbone = backbone_of("gemma2", "bfloat16", vocabulary=301)
    native = Native(backbone, "bfloat16", 3)
    native.text(prompt_ids(20, 301))
    rows, parents = prompt_ids(30, 301, seed=2), random_parents(30, 2)
    logits = native.tree(rows, parents)[1]
    settled = native.step.chosen(rows, parents, greedy=True)
    path = path_to(settled.accepted, parents)
    assert settled.next == logits[settled.accepted].argmax()
    for parent, row in pairwise(path):
        assert rows[row] == logits[parent].argmax()


def test_a_fixed_tree_in_one_call_is_the_torch_step() -> None:
    """Heads, table, forward and acceptance; then the path kept, step after step."""
    backbone = backbone_of("qwen3", "float32", vocabulary=96)
    heads = random_heads(backbone, 4)
    native, prompt, ranked = Native(backbone, heads=heads), prompt_ids(11, 96), 5
    root = int(native.step.prefill(prompt).argmax())
    for seed in range(6):
        tree = random_tree(seed, 24, 4, 5, spine=4)
        places = [0, *(1 + (len(path) - 1) * ranked + path[-1] for path in tree.paths[1:])]
        fixed = FixedRows([max(0, parent) for parent in tree.parents], places, ranked)
        guesses = heads.logits(native.step.last, backbone.lm_head)[:, 0].topk(ranked).indices
        known = [root, *guesses.flatten().tolist()]
        settled = native.step.fixed(root, fixed, greedy=True)
        assert settled.tokens == [known[place] for place in places]
        assert settled.guesses == known[1:]
        last = native.step.last.clone()
        native.step.rows(settled.tokens, tree.parents)
        tensors = TreeTensors.of(tree, backbone.device)
        verdict = greedy(native.step.logits(len(tree)), torch.tensor(settled.tokens), tensors)
        assert settled.next == int(verdict.next)
        assert len(tree.branches[settled.accepted]) == len(tree.branches[int(verdict.row)])
        assert torch.equal(last[0], native.step.hidden[settled.accepted])
        native.step.keep(tree.branches[settled.accepted])
        root = settled.next
    assert native.cache.length >= len(prompt) + 6


def test_kept_rows_are_the_text_prefilled() -> None:
    backbone = backbone_of("mistral", "bfloat16")
    native, other = Native(backbone, "bfloat16"), Native(backbone, "bfloat16")
    tokens, rows, parents = prompt_ids(30), prompt_ids(20, seed=3), random_parents(20, 3)
    native.text(tokens)
    native.step.rows(rows, parents)
    path = path_to(19, parents)
    native.step.keep(path)
    other.text(tokens + [rows[row] for row in path])
    assert native.cache.length == other.cache.length
    length = native.cache.length
    assert torch.equal(native.cache.buffer[..., :length, :], other.cache.buffer[..., :length, :])


def test_the_torch_step_goes_on_from_its_cache() -> None:
    backbone = backbone_of("gemma3", "float32")
    native, tokens = Native(backbone), prompt_ids(30)
    native.text(tokens[:-1])
    place = torch.tensor([29])
    hidden = backbone.hidden(torch.tensor(tokens[-1:]), place, None, native.cache)
    assert torch.allclose(hidden, native.tree(tokens[-1:], None)[0], atol=1e-4)


def test_rows_that_are_out_of_range_are_refused() -> None:
    backbone = backbone_of("llama", "float32")
    native = Native(backbone, capacity=8)
    native.text(prompt_ids(5))
    for tokens, parents in (
        ([0] * 4, None),
        ([64], None),
        ([-1], None),
        ([0, 0], [0, 1]),
        ([0, 0], [0, -1]),
    ):
        with pytest.raises(ValueError, match="out of range"):
            native.step.rows(tokens, parents)
    native.step.rows([0, 1, 2], None)


def test_two_engines_share_weights_and_threads() -> None:
    backbone = backbone_of("llama", "int8")
    model, team = NativeModel(backbone, "int8"), Team(2)
    steps = [NativeStep(model, None, team, backbone.new_cache(64)) for _ in range(2)]
    logits = [step.prefill(prompt_ids(20)).clone() for step in steps]
    assert torch.equal(*logits)
    steps[0].close()
    assert torch.equal(steps[1].prefill([3])[:, :1], steps[1].logits(1)[:, :1])


def test_the_bundled_model_writes_what_the_torch_step_writes() -> None:
    """A trained model: logits within bfloat16's rounding, and the same text until a near-tie."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.bfloat16)
    backbone = Backbone(model)
    exact = Backbone(AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32))
    prompt = AutoTokenizer.from_pretrained(BUNDLED)("The best way to learn a language is").input_ids
    native = Native(backbone, "bfloat16", capacity=160)
    token, text = int(native.step.prefill(prompt).argmax()), list(prompt)
    while len(text) < len(prompt) + 64:
        text.append(token)
        settled = native.step.chosen([token], [0], greedy=True)
        native.step.keep([0])
        token = settled.next
    with torch.inference_mode():
        whole = torch.tensor(text)
        reference = exact.logits(exact.hidden_of_text(whole)).float()
        theirs = backbone.logits(backbone.hidden_of_text(whole)).float()
    native.cache.rewind(0)
    ours = native.tree(text, None)[1]
    spread = reference.std()
    assert (ours - reference).abs().max() < 0.3 * spread
    assert (ours - reference).square().mean() <= 1.5 * (theirs - reference).square().mean()
    best = theirs[len(prompt) - 1 : -1].max(-1).values
    chosen = theirs[torch.arange(len(prompt) - 1, len(text) - 1), whole[len(prompt) :]]
    assert (best - chosen).max() < 0.1 * spread


@pytest.mark.parametrize("quant", ["nf4", "nf4-double", "int8"])
def test_layers_of_bitsandbytes_are_read_with_their_own_values(quant: Any) -> None:
    """Against their dequantized weights, packed anew: that finds the same codes again."""
    pytest.importorskip("bitsandbytes")
    backbone, plain = backbone_of("llama", "bfloat16"), backbone_of("llama", "bfloat16")
    layers, twins = backbone.model.model.layers, plain.model.model.layers
    for parent, twin in zip(layers.modules(), twins.modules(), strict=True):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                quantized = quantize_linear(child, quant, torch.device("cpu"))
                setattr(parent, name, quantized)
                weight = torch.nn.Parameter(_dequantized(quantized), requires_grad=False)
                getattr(twin, name).weight = weight
    tokens = prompt_ids(30)
    ours = Native(backbone, "bfloat16").tree(tokens, None)[1]
    native = Native(plain, quant.removesuffix("-double"), lm_head="bfloat16")
    reference = native.tree(tokens, None)[1]
    assert (ours - reference).abs().max() < 0.001 * reference.abs().max()


def _dequantized(layer: Any) -> Any:
    if type(layer).__name__ == "Linear8bitLt":
        return layer.weight.data.float() * layer.weight.SCB[:, None].float() / 127
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(layer.weight.data, state)


def test_every_variant_of_this_processor_agrees_with_the_portable_one() -> None:
    library = load()
    best = library.mc_variant()
    for name in library.mc_variants().split():
        library.mc_use(name)
        assert library.mc_check() == 1, name
    library.mc_use(best)
