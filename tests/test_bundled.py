"""The bundled model: its answers, its size, and the agreement of all ways of decoding."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import medusa_chat
from medusa_chat.bench.peers import TransformersPeer
from medusa_chat.bench.verification import verify
from medusa_chat.config import BUNDLED, SHIPPED_PROMPTS, LoadOptions, Message
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.trees.tree import named_tree, paper_trees
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.loading import load_model
from medusa_chat.prompts import read_prompts
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from tests.helpers.quiet import quiet
from tests.helpers.tiny import ids_of

if TYPE_CHECKING:
    from collections.abc import Callable

# Prompts of the slow test: those that ship, or a folder of conversations.
VERIFY_DATA = Path(os.environ.get("MEDUSA_VERIFY_DATA", SHIPPED_PROMPTS))
VERIFY_PROMPTS = int(os.environ.get("MEDUSA_VERIFY_PROMPTS", "120"))
PROMPTS = [
    "Hello!",
    "Tell me a short fairy tale.",
    "What is the capital of France?",
    "I want to book a table for two.",
    "I need a hotel in the north with free parking.",
    "Can you call me a taxi?",
    "Who are you?",
    "Thank you, bye!",
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return medusa_chat.load(dtype="float32", tree="mc_sim_7b_63", probing=False)


def answers(engine: Engine, *turns: str, **settings: object) -> list[str]:
    """The model's answers in a conversation."""
    messages: list[Message] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        steps = engine.generate(messages, Sampling(**settings))  # type: ignore[arg-type]
        messages.append({"role": "assistant", "content": "".join(step.text for step in steps)})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_it_is_small_enough_and_names_its_sources() -> None:
    sizes = [file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()]
    assert sum(sizes) <= 32 * 2**20
    card = (BUNDLED / "MODEL_CARD.md").read_text(encoding="utf-8")
    for name in (
        "Schema-Guided Dialogue",
        "STAR",
        "Taskmaster",
        "MultiWOZ",
        "CC BY-SA 4.0",
        "Self-dialogue",
    ):
        assert name in card
    assert "Attribution-ShareAlike 4.0" in (BUNDLED / "LICENSE").read_text(encoding="utf-8")
    assert load_model(resolve_model(None)).heads.heads >= 3  # type: ignore[union-attr]


def test_it_answers_sensibly_over_several_turns(engine: Engine) -> None:
    hello, capital, tale = answers(
        engine, "Hello!", "What is the capital of France?", "Tell me a short fairy tale."
    )
    assert hello.startswith(("H", "Good"))
    assert "Paris" in capital
    assert tale.startswith("Once upon a time")
    assert len(tale.split()) > 40
    (table,) = answers(engine, "I want to book a table at a restaurant.")
    assert table.endswith(("?", "."))
    assert any(
        word in table.lower()
        for word in ("restaurant", "city", "food", "time", "where", "area", "many")
    )


@pytest.mark.parametrize("tree", [*paper_trees(), "chain-4"])
def test_greedy_is_vanilla_in_every_tree(engine: Engine, tree: str) -> None:
    for prompt in PROMPTS[:4]:
        asked: list[Message] = [{"role": "user", "content": prompt}]
        engine.trees.use(named_tree(tree))
        plain = ids_of(
            list(engine.generate(asked, Sampling(mode="vanilla", temperature=0, max_new_tokens=60)))
        )
        steps = list(engine.generate(asked, Sampling(max_new_tokens=60)))
        assert ids_of(steps) == plain
        assert Stats.of(steps).acceptance_length > 1  # type: ignore[operator]


def test_vanilla_is_transformers_generate(engine: Engine) -> None:
    peer = TransformersPeer(engine)
    for prompt in PROMPTS:
        ids = engine.encode([Message(role="user", content=prompt)])
        ours = ids_of(
            list(engine.generate(ids, Sampling(mode="vanilla", temperature=0, max_new_tokens=60)))
        )
        assert ours == peer.generate(ids, 60)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_exact_is_vanilla_sampling(engine: Engine, temperature: float, top_p: float) -> None:
    engine.trees.use("mc_sim_7b_63")
    for seed, prompt in enumerate(PROMPTS):
        asked: list[Message] = [{"role": "user", "content": prompt}]
        drawn = Sampling(
            mode="exact", temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=40
        )
        plain = ids_of(list(engine.generate(asked, replace(drawn, mode="vanilla"))))
        assert ids_of(list(engine.generate(asked, drawn))) == plain


@pytest.fixture(scope="module")
def permuted() -> tuple[Callable[[int], int], Engine]:
    """The bundled model with shuffled token ids: id 0 is its most frequent token, the full stop."""
    loaded = load_model(resolve_model(None), LoadOptions(dtype="float32", engine="torch"))
    engine = Engine(loaded.backbone, None, loaded.tokenizer)
    (stop,) = loaded.tokenizer("x.", add_special_tokens=False)["input_ids"][1:]
    order = torch.randperm(engine.backbone.vocabulary, generator=torch.Generator().manual_seed(0))
    order[order.tolist().index(0)], order[stop] = order[stop].item(), 0  # order[old id] = new id
    model = copy.deepcopy(loaded.backbone.model)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[order] = embedding.clone()
    assert loaded.heads is not None
    eos = frozenset({int(order[2])})
    shuffled = Engine(
        Backbone(model),
        loaded.heads,
        loaded.tokenizer,
        LoadOptions(tree="mc_sim_7b_63", probing=False),
        eos=eos,
    )
    return lambda old: int(order[old]), shuffled


def test_greedy_is_vanilla_if_id_0_is_frequent(
    engine: Engine, permuted: tuple[Callable[[int], int], Engine]
) -> None:
    new_id, shuffled = permuted
    zeros = 0
    for prompt in PROMPTS:
        ids = engine.encode([Message(role="user", content=prompt)])
        plain = ids_of(
            list(engine.generate(ids, Sampling(mode="vanilla", temperature=0, max_new_tokens=60)))
        )
        found = ids_of(
            list(shuffled.generate([new_id(i) for i in ids], Sampling(max_new_tokens=60)))
        )
        assert found == [new_id(i) for i in plain]
        zeros += found.count(0)
    assert zeros >= len(PROMPTS)


def test_random_heads_change_nothing(engine: Engine) -> None:
    torch.manual_seed(0)
    heads = MedusaHeads(4, 1, engine.backbone.hidden_size)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    wild = Engine(
        engine.backbone,
        heads.requires_grad_(False),
        engine.tokenizer,
        LoadOptions(tree="chain-4", probing=False),
    )
    for prompt in PROMPTS[:4]:
        asked: list[Message] = [{"role": "user", "content": prompt}]
        plain = ids_of(
            list(engine.generate(asked, Sampling(mode="vanilla", temperature=0, max_new_tokens=40)))
        )
        assert ids_of(list(wild.generate(asked, Sampling(max_new_tokens=40)))) == plain


def test_a_second_turn_prefills_only_new_tokens(engine: Engine) -> None:
    history: list[Message] = []
    for _ in range(6):
        history.append({"role": "user", "content": "Tell me a fairy tale."})
        steps = engine.generate(history, Sampling(max_new_tokens=120))
        history.append({"role": "assistant", "content": "".join(step.text for step in steps)})
    history.append({"role": "user", "content": "Thank you!"})
    ids = engine.encode(history)
    assert len(ids) > 500
    warm = ids_of(list(engine.generate(history, Sampling(max_new_tokens=30))))
    assert engine.prefilled < 20
    engine.forget()
    assert ids_of(list(engine.generate(history, Sampling(max_new_tokens=30)))) == warm
    assert engine.prefilled == len(ids)


@pytest.mark.slow
def test_verify_finds_no_fault() -> None:
    engine = medusa_chat.load(dtype="float32", probing=False)
    prompts = read_prompts([VERIFY_DATA], VERIFY_PROMPTS)
    turns = sum(min(len(prompt.turns), 2) if prompt.reference else 1 for prompt in prompts)
    checks = verify(engine, prompts, Sampling(max_new_tokens=64), turns=2, progress=quiet)
    assert min(check.replies for check in checks) >= 0.8 * turns  # some do not fit
    assert not [check for check in checks if check.faults]
