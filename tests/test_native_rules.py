"""The rules in C decide as torch's rules do, or not at all."""

from __future__ import annotations

from ctypes import sizeof
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.decoding import penalties
from medusa_chat.decoding.acceptance import TreeTensors, make_rule
from medusa_chat.decoding.noise import token_keys
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.native import library, structures
from medusa_chat.native.rules import NativeRules
from medusa_chat.sampling import Sampling
from tests.helpers.native_library import need_library
from tests.helpers.tiny import random_tree

need_library()

CPU = torch.device("cpu")
CUTS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_k": 5},
    {"min_p": 0.1},
    {"top_p": 0.8, "top_k": 12, "min_p": 0.02},
]
PENALTIES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.4},
]


def decisions(seed: int, vocabulary: int, nodes: int, sampling: Sampling, sharpness: float) -> Any:
    """Decide a random step in torch and in C. Candidates are often likely ones."""
    chance = torch.Generator().manual_seed(seed)
    tree = random_tree(seed, nodes, 5, 4, spine=3)
    logits = torch.randn(len(tree), vocabulary, generator=chance) * sharpness
    candidates = torch.randint(vocabulary, (len(tree),), generator=chance)
    for row in range(1, len(tree)):
        rank = min(tree.paths[row][-1], vocabulary - 1)
        candidates[row] = logits[tree.parents[row]].topk(rank + 1).indices[-1]
    position = seed % 8000
    counts = None
    if sampling.penalized:
        counts = penalties.new_counts(vocabulary, CPU)
        penalties.begin(counts, torch.randint(vocabulary, (20,), generator=chance).tolist())
        penalties.extend(counts, torch.randint(vocabulary, (30,), generator=chance).tolist())
    rule = make_rule(sampling, counts)
    verdict = rule(logits, candidates, TreeTensors.of(tree, CPU), position)
    found = NativeRules(token_keys(vocabulary, CPU)).decide(
        rule.kind, rule.numbers, counts, logits, candidates.tolist(), tree.parents, position
    )
    return (int(verdict.row), int(verdict.next)), found


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([4, 15, 64, 333, 4097]),
    nodes=st.integers(1, 30),
    cut=st.sampled_from(CUTS),
    penalty=st.sampled_from(PENALTIES),
    mode=st.sampled_from(["greedy", "exact", "typical", "vanilla"]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.5]),
    sharpness=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    draw=st.integers(0, 2**32 - 1),
)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_a_decision_in_c_is_that_of_torch(
    seed: int,
    vocabulary: int,
    nodes: int,
    cut: dict[str, Any],
    penalty: dict[str, Any],
    mode: Any,
    temperature: float,
    sharpness: float,
    draw: int,
) -> None:
    sampling = Sampling(mode=mode, temperature=temperature, seed=draw, **cut, **penalty)
    expected, found = decisions(seed, vocabulary, nodes, sampling, sharpness)
    assert found in (expected, None)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"mode": "greedy"},
        {"mode": "exact", "temperature": 0.8},
        {"mode": "exact", "temperature": 0.8, "top_p": 0.9},
        {"mode": "exact", "top_k": 40, "min_p": 0.05},
        {"mode": "typical", "temperature": 0.7},
    ],
    ids=str,
)
def test_nearly_all_decisions_are_certain(how: dict[str, Any], penalty: dict[str, Any]) -> None:
    undecided = 0
    for seed in range(40):
        sampling = Sampling(**how, **penalty, seed=seed)
        expected, found = decisions(seed, 3000, 20, sampling, 3.0)
        undecided += found is None
        assert found in (expected, None)
    assert undecided <= 4


def test_equal_scores_and_numbers_that_are_not_finite_are_left_to_torch() -> None:
    rules = NativeRules(token_keys(40, CPU))
    exact = Sampling(mode="exact", temperature=1.0)
    typical = Sampling(mode="typical", temperature=1.0)
    for value in (float("nan"), float("inf")):
        logits = torch.zeros(1, 40)
        logits[0, 7] = value
        for sampling in (exact, typical):
            rule = make_rule(sampling)
            assert rules.decide(rule.kind, rule.numbers, None, logits, [1], [0], 3) is None
    logits = torch.zeros(1, 40)
    for top_p in (0.5, 1e-4):  # which of equal tokens go depends on the sort
        rule = make_rule(Sampling(mode="exact", top_p=top_p))
        expected = int(rule(logits, torch.tensor([1]), TreeTensors.of(Tree(), CPU), 3).next)
        assert rules.decide(rule.kind, rule.numbers, None, logits, [1], [0], 3) in (
            None,
            (0, expected),
        )
    rule = make_rule(Sampling(mode="typical", top_p=0.5))
    assert rules.decide(rule.kind, rule.numbers, None, logits, [1], [0], 3) is None


def test_rows_out_of_range_decide_nothing() -> None:
    rules = NativeRules(token_keys(8, CPU))
    rule = make_rule(Sampling(mode="exact"))
    logits = torch.zeros(2, 8)
    for tokens, parents in (([1, 8], [0, 0]), ([1, 2], [0, 1]), ([1, -1], [0, 0])):
        assert rules.decide(rule.kind, rule.numbers, None, logits, tokens, parents, 3) is None
    assert sizeof(structures.Rule) == library.load().mc_rule_size()
