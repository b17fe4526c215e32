"""Penalties: each node's are those of its own path, in every mode and every kind of step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from medusa_chat.decoding import penalties
from medusa_chat.decoding.acceptance import Rule, TreeTensors, make_rule
from medusa_chat.decoding.numbers import Numbers
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.sampling import Sampling
from tests.helpers.tiny import (
    NEW,
    PROMPT,
    OracleHeads,
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    random_tree,
    reply,
)

CPU = torch.device("cpu")
LAWS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 0.8, "presence_penalty": -0.6, "frequency_penalty": 0.9},
]
STRONG = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4}


def by_definition(
    logits: Tensor, prompt: list[int], replied: list[int], sampling: Sampling
) -> Tensor:
    """Logits [V] as transformers' processor and the definitions of vLLM's documentation have them.

    presence: once for a token of the reply; frequency: for each of its occurrences there.
    """
    process = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    scores: Tensor = process(torch.tensor([prompt + replied]), logits[None].clone())[0]
    for token in set(replied):
        scores[token] -= sampling.frequency_penalty * replied.count(token)
        scores[token] -= sampling.presence_penalty
    return scores


def counted(vocabulary: int, prompt: list[int], replied: list[int]) -> Tensor:
    counts = penalties.new_counts(vocabulary, CPU)
    penalties.begin(counts, prompt)
    penalties.extend(counts, replied)
    return counts


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(4, 30),
    nodes=st.integers(1, 24),
    law=st.sampled_from(LAWS),
    mode=st.sampled_from(["greedy", "typical", "exact", "vanilla"]),
    on_device=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_node_is_penalized_for_its_own_path(
    seed: int, vocabulary: int, nodes: int, law: dict[str, Any], mode: Any, on_device: bool
) -> None:
    """Siblings repeat tokens of one another and of the text, which must not count for them."""
    chance = torch.Generator().manual_seed(seed)
    tree = random_tree(seed, nodes, 5, 3, spine=2)
    logits = torch.randn(len(tree), vocabulary, generator=chance) * 3
    candidates = torch.randint(vocabulary, (len(tree),), generator=chance)
    prompt = torch.randint(vocabulary, (5,), generator=chance).tolist()
    replied = torch.randint(vocabulary, (7,), generator=chance).tolist()
    sampling = Sampling(mode=mode, seed=seed, **law)
    rows = [
        by_definition(logits[row], prompt, replied + candidates[list(branch)].tolist(), sampling)
        for row, branch in enumerate(tree.branches)
    ]
    tensors = TreeTensors.of(tree, CPU)
    expected = make_rule(sampling)(torch.stack(rows), candidates, tensors, 9)
    rule = make_rule(sampling, counted(vocabulary, prompt, replied))
    if on_device:
        numbers = torch.tensor(rule.numbers, dtype=torch.float64)
        rule = Rule(rule.kind, Numbers(*numbers.unbind()), rule.counts)
    verdict = rule(logits, candidates, tensors, 9)
    assert (int(verdict.row), int(verdict.next)) == (int(expected.row), int(expected.next))
    scores = penalties.penalize_paths(
        logits, counted(vocabulary, prompt, replied), rule.numbers, candidates, tensors.ancestors
    )
    assert torch.allclose(scores, torch.stack(rows), atol=1e-5)


def test_the_first_token_is_chosen_after_the_prompt_alone() -> None:
    """The prompt's last token counts as the prompt's, and not as the reply's."""
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    for law, following in (
        ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, 0),
        ({"repetition_penalty": 1.2}, 1),
    ):
        rule = make_rule(Sampling(**law), counted(3, [2, 0], []))  # type: ignore[arg-type]
        assert rule.first(logits, 1) == following


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "static"])
@pytest.mark.parametrize("law", [LAWS[0], STRONG], ids=str)
def test_every_mode_and_tree_gives_the_penalized_text_of_vanilla(law: Any, eager: bool) -> None:
    """Oracle heads make long paths; replies with and without penalties take turns."""
    backbone = random_backbone()
    for mode, seed in (("greedy", 0), ("exact", 2)):
        free: dict[str, Any] = {"max_new_tokens": NEW, "seed": seed}
        baseline = {"mode": "vanilla", "temperature": 0.0 if mode == "greedy" else 0.7}
        plain = make_engine(backbone)
        expected = reply(plain, PROMPT, **baseline, **free, **law)
        without = reply(plain, PROMPT, **baseline, **free)
        assert expected != without
        for tree, copies in ((random_tree(1, 24, 4, 3, spine=4), False), ("dynamic-16", True)):
            heads = OracleHeads(4, 64, PROMPT + expected, (0, 0, 1, -1), seed=3)
            engine = make_engine(backbone, heads, tree, copies=copies, eager=eager)
            steps = decode(engine, PROMPT, mode=mode, **free, **law)
            assert ids_of(steps) == expected
            assert max(step.accepted for step in steps) >= 2
            heads.text = PROMPT + without
            assert reply(engine, PROMPT, mode=mode, **free) == without
            heads.text = PROMPT + expected  # counts begin anew
            assert reply(engine, PROMPT, mode=mode, **free, **law) == expected


def test_vanilla_is_transformers_generate_with_its_repetition_penalty() -> None:
    backbone = random_backbone()
    text = torch.tensor([PROMPT])
    output = backbone.model.generate(
        text,
        attention_mask=torch.ones_like(text),
        do_sample=False,
        max_new_tokens=NEW,
        repetition_penalty=1.3,
    )
    engine = make_engine(backbone, random_heads(backbone), "mc_sim_7b_63")
    found = reply(engine, PROMPT, max_new_tokens=NEW, repetition_penalty=1.3)
    assert found == output[0, len(PROMPT) :].tolist()


def test_typical_replies_are_penalized_too() -> None:
    """A penalty that forbids repeated tokens leaves each token at most once."""
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone), "mc_sim_7b_63")
    law = {"mode": "typical", "temperature": 0.7, "max_new_tokens": 24, "seed": 1}
    free = reply(engine, prompt_ids(4), **law)
    once = reply(engine, prompt_ids(4), **law, repetition_penalty=1e6)
    assert len(set(free)) < len(free)
    assert len(set(once)) == len(once)
    assert not set(once) & set(prompt_ids(4))


def test_a_root_alone_is_a_path() -> None:
    rule = make_rule(Sampling(presence_penalty=1.0), counted(3, [1], []))
    logits = torch.tensor([[2.0, 1.5, 0.0]])
    verdict = rule(logits, torch.tensor([0]), TreeTensors.of(Tree(), CPU), 1)
    assert int(verdict.next) == 1
