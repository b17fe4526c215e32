"""The engine over the native step: heads with a bias, with a vocabulary, coupled to the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import medusa_chat
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.trees.tree import DynamicTree
from medusa_chat.model.head_vocabulary import HeadVocabulary
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import write_heads
from medusa_chat.sampling import Sampling
from tests.helpers.native_library import need_library
from tests.helpers.tiny import (
    END,
    decode,
    ids_of,
    prompt_ids,
    random_model,
    random_tree,
    reply,
    save_model,
)

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.trees.tree import AnyTree

need_library()

TREES = ("chain-3", "mc_sim_7b_63", "static-16", "dynamic-16", "dynamic-64")


LAWS: tuple[dict[str, Any], ...] = (
    {"mode": "greedy"},
    {"mode": "exact", "temperature": 0.7, "seed": 4},
    {"mode": "exact", "temperature": 1.0, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
)


@pytest.fixture(scope="module", params=["bias", "vocabulary", "both"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads rank behind each node, or a third of the tokens, or both."""
    folder = tmp_path_factory.mktemp("own")
    save_model(folder, random_model("llama", 320, pad_token_id=0, eos_token_id=END))
    vocabulary, rank = None, 0 if request.param == "vocabulary" else 6
    if request.param != "bias":
        vocabulary = HeadVocabulary(torch.arange(0, 320, 3), 320)
    heads = MedusaHeads(4, 1, 32, vocabulary=vocabulary, parent_bias=rank, size=320)
    for parameter in heads.parameters():
        parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    write_heads(heads, folder)
    return folder


def engine_of(folder: Path, **options: Any) -> Engine:
    return medusa_chat.load(str(folder), device="cpu", tree="chain-1", probing=False, **options)


def test_every_tree_writes_what_vanilla_writes(folder: Path) -> None:
    own_heads = engine_of(folder, threads=2)
    prompt, seen = prompt_ids(20, 256, 3) * 2, set()
    for settings in LAWS:
        warmth = {"temperature": 0} if settings["mode"] == "greedy" else {}
        plain = reply(
            own_heads, prompt, **(settings | warmth | {"mode": "vanilla", "max_new_tokens": 40})
        )
        for tree in TREES:
            for copies in (False, True):
                own_heads.trees.use(tree)
                own_heads.trees.use_copies(copies)
                steps = decode(own_heads, prompt, **settings, max_new_tokens=40)
                assert ids_of(steps) == plain, (tree, copies)
                seen |= {token.head for step in steps for token in step.tokens}
    assert len(plain) > 20
    assert len(seen) > 1  # guesses are accepted


def test_the_nodes_are_those_of_the_torch_step(folder: Path) -> None:
    """In float32 both choose the same nodes, step after step."""
    engines = [engine_of(folder, dtype="float32", engine=name) for name in ("native", "torch")]
    prompt = prompt_ids(20, 256, 3) * 2
    fixed = random_tree(2, 30, 4, 6)
    trees: list[AnyTree] = [fixed, DynamicTree(random_tree(5, 90, 4, 6), 20), fixed]
    for law in LAWS:
        sampling, reports = Sampling(**law), []
        for runner in (engine.runner for engine in engines):
            runner.cache.rewind(0)
            rule = runner.begin(prompt, sampling)
            root, found = runner.prefill(prompt, rule), []
            for step in range(12):
                tree = trees[step % len(trees)]
                copied = Copied(tuple(range(CHAIN)), (-0.7,) * CHAIN, 2) if step % 2 else None
                report = runner.step(root, tree, rule, copied)
                found.append((report.paths, report.candidates, report.rows, report.next))
                root = report.next
            reports.append(found)
        assert reports[0] == reports[1], law
