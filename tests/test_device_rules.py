"""Rules whose numbers are tensors equal those whose numbers are the sampling's own, and read nothing on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from medusa_chat.config import Sampling
from medusa_chat.decoding import acceptance
from medusa_chat.decoding.acceptance import TreeTensors, make_rule, make_warp, path_to
from medusa_chat.decoding.device_rules import KINDS, decide, kind_of, numbers_of, truncated
from tests.helpers.tiny import random_tree
from tests.test_acceptance import CPU, random_step

cuts = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 10**6]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    }
)


def numbers(sampling: Sampling) -> torch.Tensor:
    return torch.tensor(numbers_of(sampling), dtype=torch.float64)


@given(cut=cuts, seed=st.integers(0, 10**6), vocabulary=st.integers(2, 60), ties=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_truncation_is_that_of_transformers(
    cut: Any, seed: Any, vocabulary: Any, ties: Any
) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    logits = logits.round() if ties else logits
    temperature, top_k, top_p, min_p = numbers(sampling := Sampling(**cut))[:4].unbind()
    ours = truncated(logits / temperature.float(), top_k, top_p, min_p)
    assert torch.equal(ours, make_warp(sampling)(logits))


@given(
    cut=cuts,
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(4, 60),
    nodes=st.integers(2, 24),
    mode=st.sampled_from(["greedy", "typical", "exact"]),
    truncate=st.booleans(),
    draw=st.integers(0, 2**32 - 1),
    position=st.integers(0, 10**5),
    epsilon=st.sampled_from([0.03, 0.09, 1.0]),
    delta=st.sampled_from([0.1, 0.3, 5.0]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_decision_is_that_of_the_rule(
    cut: Any,
    seed: Any,
    vocabulary: Any,
    nodes: Any,
    mode: Any,
    truncate: Any,
    draw: Any,
    position: Any,
    epsilon: Any,
    delta: Any,
) -> None:
    logits, candidates, tree = random_step(seed, vocabulary, nodes, 1.5)
    cut = cut if truncate else {"temperature": cut["temperature"]}
    sampling = Sampling(mode=mode, seed=draw, epsilon=epsilon, delta=delta, **cut)
    step = logits, candidates, TreeTensors.of(tree, CPU)
    rule = make_rule(sampling)
    expected = rule(*step, position)
    verdict = decide(kind_of(rule), numbers(sampling), *step, torch.tensor(position))
    assert (int(verdict.row), int(verdict.next)) == (int(expected.row), int(expected.next))


def test_kinds_follow_what_is_truncated() -> None:
    exact = Sampling(mode="exact")
    for change in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert kind_of(make_rule(replace(exact, **change))) == "exact-truncated"
        assert kind_of(make_rule(replace(exact, mode="greedy", **change))) == "greedy"
        assert kind_of(make_rule(replace(exact, mode="typical", **change))) == "typical-truncated"
    assert kind_of(make_rule(exact)) == "exact"
    assert kind_of(make_rule(replace(exact, temperature=0))) == "greedy"
    assert kind_of(make_rule(replace(exact, mode="vanilla", sample=True))) == "exact"


@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_path_is_the_branch_of_its_node(seed: Any, nodes: Any) -> None:
    tree = random_tree(seed, nodes, 5, 4, spine=3)
    tensors = TreeTensors.of(tree, CPU)
    for row, branch in enumerate(tree.branches):
        path = path_to(torch.tensor(row), tensors).tolist()
        assert path == [*branch, *[0] * (tree.depth + 1 - len(branch))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_decision_reads_nothing_on_the_host(kind: Any) -> None:
    """Fake tensors have no data: to look at one raises."""
    tree = random_tree(1, 12, 4, 3, spine=3)
    acceptance.token_keys.cache_clear()
    with FakeTensorMode():
        depths, parents = torch.zeros(2, len(tree), dtype=torch.long)
        ancestors = torch.zeros(len(tree), len(tree), dtype=torch.bool)
        tensors = TreeTensors(parents, depths, ancestors, tree.depth)
        candidates, logits = torch.zeros(len(tree), dtype=torch.long), torch.zeros(len(tree), 50)
        verdict = decide(
            kind,
            torch.zeros(7).double(),
            logits,
            candidates,
            tensors,
            torch.zeros((), dtype=torch.long),
        )
        assert verdict.row.shape == verdict.next.shape == ()
        assert path_to(verdict.row, tensors).shape == (tree.depth + 1,)
    acceptance.token_keys.cache_clear()
