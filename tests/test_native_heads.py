"""The heads in the native step: guesses, a vocabulary of their own, trees chosen by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.decoding.acceptance import TreeTensors, greedy, truncate
from medusa_chat.decoding.noise import gumbel
from medusa_chat.model.head_vocabulary import HeadVocabulary
from medusa_chat.native.rows import ChosenRows, Noise
from tests.helpers.native_library import need_library
from tests.helpers.native_tiny import Native, backbone_of
from tests.helpers.tiny import prompt_ids, random_heads, random_tree

if TYPE_CHECKING:
    from medusa_chat.model.backbone import Backbone

need_library()

FORMATS = ("float32", "bfloat16", "int8", "nf4")


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_heads_guess_what_the_torch_heads_guess(own: Any, layers: Any) -> None:
    backbone = backbone_of("llama", "float32", vocabulary=333)
    heads = random_heads(backbone, 4, layers, own)
    native = Native(backbone, heads=heads)
    native.step.last.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(4)))
    logits = heads.logits(native.step.last, backbone.lm_head)[:, 0]
    for ranked in (1, 10, 64):
        guesses, log_p = native.step.guess(ranked)
        likeliest = logits.log_softmax(-1).topk(ranked)
        assert guesses == likeliest.indices.flatten().tolist()
        assert torch.allclose(log_p, likeliest.values, atol=1e-4)


def test_equal_guesses_come_with_the_lower_id_first() -> None:
    backbone = backbone_of("llama", "float32", vocabulary=100)
    heads = random_heads(backbone, 2)
    assert heads.lm_heads is not None
    heads.lm_heads.data[:] = 0
    native = Native(backbone, heads=heads)
    assert native.step.guess(5)[0] == [0, 1, 2, 3, 4] * 2


def some_heads(backbone: Backbone, own: bool, cut: bool, rank: int, seed: int = 1) -> Any:
    """Random heads, maybe with a vocabulary of every third token, maybe with a bias."""
    vocabulary = None
    if cut:
        vocabulary = HeadVocabulary(torch.arange(0, backbone.vocabulary, 3), backbone.vocabulary)
    return random_heads(backbone, own=own, seed=seed, vocabulary=vocabulary, parent_bias=rank)


@pytest.mark.parametrize("weights", FORMATS)
def test_heads_rank_a_vocabulary_of_their_own(weights: Any) -> None:
    """Heads that share the LM head read some of its rows, as they are packed, and its biases."""
    backbone = backbone_of("llama", weights, vocabulary=64)
    shift = torch.arange(64.0).remainder(7).to(backbone.lm_head.weight.dtype)
    backbone.lm_head.bias = torch.nn.Parameter(shift)
    every = some_heads(backbone, False, False, 0)
    last = torch.randn(1, 64, generator=torch.Generator().manual_seed(4))
    found = []
    for heads, count in ((every, 64), (some_heads(backbone, False, True, 0), 22)):
        native = Native(backbone, weights, heads=heads)
        native.step.last.copy_(last)
        guesses, log_p = native.step.guess(count)
        found.append((torch.tensor(guesses).view(4, count), log_p.clone()))
    whole = torch.empty(4, 64).scatter(1, *found[0])
    likeliest = whole[:, ::3].log_softmax(-1).topk(22)
    assert torch.equal(found[1][0], 3 * likeliest.indices)
    assert torch.allclose(found[1][1], likeliest.values, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_chosen_tree_in_one_call_is_that_of_the_torch_heads(
    own: bool, cut: bool, biased: bool
) -> None:
    """The tree of the definition, over logits of the torch heads; then its rows and acceptance."""
    backbone = backbone_of("qwen3", "float32", vocabulary=96)
    heads = some_heads(backbone, own, cut, 5 if biased else 0)
    native, ranked = Native(backbone, heads=heads), 12
    tree = random_tree(3, 60, 4, 6, spine=4)
    ranks = [path[-1] if path else 0 for path in tree.paths]
    for seed in range(5):
        root = int(native.step.prefill(prompt_ids(11, 96, seed)).argmax())
        noise = Noise(seed, 11, 0.8, 9) if seed % 2 else None
        rows = ChosenRows(tree.parents, ranks, 20, ranked)
        rows.set(noise=noise)
        expected = tree_of(heads, backbone, native.step.last, root, tree, noise, ranked)
        settled = native.step.choose(root, rows, greedy=True)
        best = sorted(range(len(tree)), key=lambda row: (-expected[row][0], row))[:20]
        assert rows.rows == sorted(best)
        assert settled.tokens == rows.tokens == [expected[row][1] for row in rows.rows]
        last = native.step.last.clone()
        native.step.rows(settled.tokens, rows.parents)
        tensors = TreeTensors.from_parents(rows.parents)
        verdict = greedy(native.step.logits(20), torch.tensor(settled.tokens), tensors)
        assert (settled.accepted, settled.next) == (int(verdict.row), int(verdict.next))
        assert torch.equal(last[0], native.step.hidden[settled.accepted])


def tree_of(
    heads: Any, backbone: Any, last: Any, root: int, tree: Any, noise: Any, ranked: int
) -> list[tuple[float, int]]:
    """Score and token of each path of a tree."""
    log_p = heads.logits(last, backbone.lm_head)[:, 0].log_softmax(-1)
    ids = torch.arange(96) if heads.vocabulary is None else heads.vocabulary.tokens
    found = [(0.0, root)]
    for row in range(1, len(tree)):
        depth = tree.depths[row] - 1
        before, token = found[tree.parents[row]]
        z, indices = log_p[depth].topk(ranked)
        if heads.parent_bias is not None:
            rest = 1 - z.exp().sum()
            z = z + heads.parent_bias(torch.tensor(token))[indices]
            z = z - (rest + z.exp().sum()).log()
        if noise is not None:
            kept = truncate(z[None] / noise.temperature, noise.top_k, 1.0, 0.0)[0]
            place = torch.tensor([noise.position + depth + 1])
            z = kept + gumbel(noise.seed, place, 96)[0, ids[indices]]
            z = z - z.logsumexp(-1)
        best = int(z.argsort(descending=True, stable=True)[tree.paths[row][-1]])
        found.append((before + float(z[best]), int(ids[indices[best]])))
    return found


def test_steps_without_rows_to_choose_are_refused() -> None:
    backbone = backbone_of("llama", "float32")
    native = Native(backbone, capacity=8, heads=random_heads(backbone, 2))
    native.text(prompt_ids(5))
    for parents, size, ranked, root in (
        ([0] * 5, 4, 10, 1),  # more rows than the cache has
        ([0] * 5, 3, 10, 64),
        ([0, 0, 1, 2], 2, 10, 1),  # deeper than the heads
        ([0] * 5, 3, 0, 1),  # no heads run
        ([0] * 5, 3, 3, 1),  # ranks above the guesses
    ):
        rows = ChosenRows(parents, [0, *range(len(parents) - 1)], size, ranked)
        with pytest.raises(ValueError, match="out of range"):
            native.step.choose(root, rows, greedy=True)
    rows = ChosenRows([0] * 5, [0, 0, 1, 2, 3], 3, 10)
    native.step.choose(1, rows, greedy=True)
    native.step.rows([0, 1, 2], None)
