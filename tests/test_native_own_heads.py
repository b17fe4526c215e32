"""The engine over the native step: heads with a bias, with a vocabulary, coupled to the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import medusa_chat
from medusa_chat.model.head_vocabulary import HeadVocabulary
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import write_heads
from tests.helpers.native_library import need_library
from tests.helpers.tiny import END, decode, ids_of, prompt_ids, random_model, reply, save_model

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine

need_library()

TREES = ("chain-3", "mc_sim_7b_63", "static-16", "dynamic-16", "dynamic-64")


@pytest.fixture(scope="module", params=["bias", "vocabulary", "both"])
def own_heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
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
    return medusa_chat.load(str(folder), device="cpu", tree="chain-1", probing=False, threads=2)


def test_every_tree_writes_what_vanilla_writes(own_heads: Engine) -> None:
    prompt, seen = prompt_ids(20, 256, 3) * 2, set()
    for settings in (
        {"mode": "greedy"},
        {"mode": "exact", "temperature": 0.7, "seed": 4},
        {"mode": "exact", "temperature": 1.0, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ):
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
