"""The rules of acceptance against plain loops, truncation against transformers', and the noise."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from medusa_chat.decoding.acceptance import (
    KINDS,
    Kind,
    Rule,
    TreeTensors,
    make_rule,
    path_to,
    temper,
    truncate,
    typical,
)
from medusa_chat.decoding.noise import gumbel, token_keys
from medusa_chat.decoding.numbers import Numbers
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.sampling import Mode, Sampling
from tests.helpers.tiny import random_tree

CPU = torch.device("cpu")
POSITION = 17


def noise_at(seed: int, position: int, vocabulary: int) -> torch.Tensor:
    """Noise of one position, [V]."""
    return gumbel(seed, torch.tensor([position]), vocabulary)[0]


def random_step(
    seed: int, vocabulary: int, nodes: int, sharpness: float
) -> tuple[torch.Tensor, torch.Tensor, Tree]:
    """Logits, candidates (siblings differ, and are often likely) and a tree."""
    chance = random.Random(seed)
    tree = random_tree(seed, nodes, depth=4, width=min(vocabulary, 4), spine=2)
    logits = (
        torch.randn(len(tree), vocabulary, generator=torch.Generator().manual_seed(seed))
        * sharpness
    )
    candidates = [chance.randrange(vocabulary)]
    for row in range(1, len(tree)):
        siblings = {
            candidates[other] for other in range(1, row) if tree.parents[other] == tree.parents[row]
        }
        order = logits[tree.parents[row]].argsort(descending=True).tolist()
        free = [token for token in order if token not in siblings]
        candidates.append(free[0] if chance.random() < 0.7 else chance.choice(free))
    return logits, torch.tensor(candidates), tree


steps = st.builds(
    random_step,
    st.integers(0, 10**6),
    st.integers(4, 30),
    st.integers(2, 24),
    st.sampled_from([0.3, 1.0, 2.0, 5.0]),
)


@given(step=steps)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_greedy_equals_the_loop(step: Any) -> None:
    logits, candidates, tree = step
    verdict = make_rule(Sampling())(logits, candidates, TreeTensors.of(tree, CPU), POSITION)
    row = 0
    while True:
        best = int(logits[row].argmax())
        children = [child for child in range(1, len(tree)) if tree.parents[child] == row]
        down = [child for child in children if int(candidates[child]) == best]
        if not down:
            break
        row = down[0]
    assert (int(verdict.row), int(verdict.next)) == (row, best)


@given(step=steps, seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.3, 1.0, 2.0]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_exact_equals_the_walk_that_draws_node_by_node(
    step: Any, seed: Any, temperature: Any
) -> None:
    """Draw after the node; if a child is that token go down and draw again, else stop."""
    logits, candidates, tree = step
    rule = make_rule(Sampling(mode="exact", temperature=temperature, seed=seed))
    verdict = rule(logits, candidates, TreeTensors.of(tree, CPU), POSITION)
    row = 0
    while True:
        noise = noise_at(seed, POSITION + tree.depths[row] + 1, logits.shape[1])
        drawn = int((logits[row] / temperature + noise).argmax())
        children = [child for child in range(1, len(tree)) if tree.parents[child] == row]
        down = [child for child in children if int(candidates[child]) == drawn]
        if not down:
            break
        row = down[0]
    assert (int(verdict.row), int(verdict.next)) == (row, drawn)


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    powers = [math.exp((value - top) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def typical_bound(p: list[float], epsilon: float, delta: float) -> float:
    entropy = -sum(value * math.log(value) for value in p if value > 0)
    return min(epsilon, delta * math.exp(-entropy))


def typical_by_loops(
    logits: Any, candidates: Any, tree: Any, temperature: float, epsilon: float, delta: float
) -> Any:
    """The paper's rule, node by node: the row, the tokens that may follow, the narrowest margin."""
    laws = [softmax([float(value) for value in row], temperature) for row in logits.double()]
    bounds = [typical_bound(p, epsilon, delta) for p in laws]
    best, best_key, margins, keys = 0, (0, 0.0), [], [(0, 0.0)]
    for row in range(1, len(tree)):
        depth, likelihood = 0, 0.0
        for node in tree.branches[row][1:]:
            p = laws[tree.parents[node]][int(candidates[node])]
            margins.append(abs(p - bounds[tree.parents[node]]))
            if not p > bounds[tree.parents[node]]:
                break
            depth, likelihood = depth + 1, likelihood + math.log(p)
        else:
            keys.append((depth, likelihood))
            if (depth, likelihood) > best_key:
                best, best_key = row, (depth, likelihood)
    margins += [abs(p - bounds[best]) for p in laws[best]]
    margins += [
        abs(key[1] - best_key[1]) for key in keys if key[0] == best_key[0] and key != best_key
    ]
    return best, {token for token, p in enumerate(laws[best]) if p > bounds[best]}, min(margins)


@given(
    step=steps,
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.5, 0.7, 1.0]),
    epsilon=st.sampled_from([0.03, 0.09, 0.3]),
    delta=st.sampled_from([0.1, 0.3, 0.6]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_typical_equals_the_paper_by_loops(
    step: Any, seed: Any, temperature: Any, epsilon: Any, delta: Any
) -> None:
    logits, candidates, tree = step
    row, allowed, margin = typical_by_loops(logits, candidates, tree, temperature, epsilon, delta)
    if margin < 1e-5:
        return  # float32 may fall either way
    sampling = Sampling(
        mode="typical", temperature=temperature, epsilon=epsilon, delta=delta, seed=seed
    )
    verdict = make_rule(sampling)(logits, candidates, TreeTensors.of(tree, CPU), POSITION)
    assert int(verdict.row) == row
    noise = noise_at(seed, POSITION + tree.depths[row] + 1, logits.shape[1])
    scores = (logits[row] / temperature + noise).tolist()
    assert int(verdict.next) == max(allowed, key=lambda token: scores[token])


def test_typical_accepts_what_greedy_would_not() -> None:
    """Greedy keeps the likelier of two tokens, typical either; the likelier path of two wins."""
    tree = Tree.of([[0], [1], [0, 0], [1, 0]])
    logits = torch.tensor(
        [[1.0, 0.9, -9, -9], [0, 0, 0, 9], [0, 0, 9, 0], [0, 0, 0, 9], [9, 0, 0, 0]]
    )
    candidates = torch.tensor(
        [3, 1, 0, 3, 1]
    )  # row 1 holds token 1, row 2 token 0; row 4's guess is unlikely
    tensors = TreeTensors.of(tree, CPU)
    assert int(make_rule(Sampling())(logits, candidates, tensors, 0).row) == 2
    verdict = make_rule(Sampling(mode="typical", temperature=1.0))(logits, candidates, tensors, 0)
    assert (int(verdict.row), int(verdict.next)) == (3, 3)


def test_typical_entropy_is_finite_where_tokens_are_cut_off() -> None:
    tree = TreeTensors.of(Tree.of([[0], [0, 0]]), CPU)
    logits = torch.tensor([[3.0, 2.9, -1, -2], [3.0, 2.0, 1, 0], [0, 0, 0, 0]])
    logits[2, 1:] = float("-inf")
    candidates = torch.tensor([0, 1, 2])
    numbers = Numbers.of(Sampling(epsilon=0.09, delta=0.3))
    verdict = typical(truncate(logits, 1, 1.0, 0.0), candidates, tree, 0, numbers)
    assert (int(verdict.row), int(verdict.next)) == (0, 0)
    kept = typical(logits, torch.tensor([0, 1, 0]), tree, 0, numbers)
    assert (int(kept.row), int(kept.next)) == (2, 0)


def test_typical_always_has_a_next_token() -> None:
    """With a delta so large that no token passes the bound, the likeliest one follows."""
    tree = TreeTensors.of(Tree(), CPU)
    logits = torch.zeros(1, 50)
    logits[0, 7] = 0.01
    rule = make_rule(Sampling(mode="typical", temperature=1.0, epsilon=1.0, delta=60.0, seed=3))
    assert int(rule(logits, torch.tensor([0]), tree, 0).next) == 7


@pytest.mark.parametrize("mode", ["typical", "exact"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-44])
def test_a_tiny_temperature_is_the_argmax(mode: Any, temperature: Any) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.5]])
    rule = make_rule(Sampling(mode=mode, temperature=temperature))
    assert int(rule(logits, torch.tensor([0]), TreeTensors.of(Tree(), CPU), 0).next) == 1


# ---- truncation, and numbers on the device ----

cuts = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 10**6]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    }
)


def on_device(numbers: Numbers) -> Numbers:
    """The same numbers as tensors [], as a step's input has them."""
    return Numbers(*torch.tensor(numbers, dtype=torch.float64).unbind())


def truncated_by_transformers(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores of the warpers that transformers has for these settings."""
    warpers: Any = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    no_text = torch.empty(0, dtype=torch.long)  # these warpers look at the scores alone
    scores: torch.Tensor = warpers(no_text, logits / sampling.temperature)
    return scores


@given(cut=cuts, seed=st.integers(0, 10**6), vocabulary=st.integers(2, 60), ties=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_truncation_is_that_of_transformers(
    cut: dict[str, Any], seed: int, vocabulary: int, ties: bool
) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    logits = logits.round() if ties else logits
    sampling = Sampling(**cut)
    expected = truncated_by_transformers(logits, sampling)
    for numbers in (Numbers.of(sampling), on_device(Numbers.of(sampling))):
        scores = temper(logits, numbers.temperature)
        ours = truncate(scores, numbers.top_k, numbers.top_p, numbers.min_p)
        assert torch.equal(ours, expected)


@given(
    cut=cuts,
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(4, 60),
    nodes=st.integers(2, 24),
    mode=st.sampled_from(["greedy", "typical", "exact"]),
    truncated=st.booleans(),
    draw=st.integers(0, 2**32 - 1),
    position=st.integers(0, 10**5),
    epsilon=st.sampled_from([0.03, 0.09, 1.0]),
    delta=st.sampled_from([0.1, 0.3, 5.0]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_numbers_on_the_device_decide_the_same(
    cut: dict[str, Any],
    seed: int,
    vocabulary: int,
    nodes: int,
    mode: Mode,
    truncated: bool,
    draw: int,
    position: int,
    epsilon: float,
    delta: float,
) -> None:
    logits, candidates, tree = random_step(seed, vocabulary, nodes, 1.5)
    cut = cut if truncated else {"temperature": cut["temperature"]}
    sampling = Sampling(mode=mode, seed=draw, epsilon=epsilon, delta=delta, **cut)
    step = logits, candidates, TreeTensors.of(tree, CPU)
    rule = make_rule(sampling)
    expected = rule(*step, position)
    verdict = Rule(rule.kind, on_device(rule.numbers))(*step, torch.tensor(position))
    assert (int(verdict.row), int(verdict.next)) == (int(expected.row), int(expected.next))


def test_the_kind_of_a_rule_says_if_it_truncates() -> None:
    exact = Sampling(mode="exact")
    changes: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}]
    for change in changes:
        assert make_rule(replace(exact, **change)).kind == "exact-truncated"
        assert make_rule(replace(exact, mode="greedy", **change)).kind == "greedy"
        assert make_rule(replace(exact, mode="typical", **change)).kind == "typical-truncated"
    assert make_rule(exact).kind == "exact"
    assert make_rule(replace(exact, temperature=0)).kind == "greedy"
    assert make_rule(replace(exact, mode="vanilla")).kind == "exact"


@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_path_is_the_branch_of_its_node(seed: int, nodes: int) -> None:
    tree = random_tree(seed, nodes, 5, 4, spine=3)
    tensors = TreeTensors.of(tree, CPU)
    for row, branch in enumerate(tree.branches):
        path = path_to(torch.tensor(row), tensors).tolist()
        assert path == [*branch, *[0] * (tree.depth + 1 - len(branch))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_decision_reads_nothing_on_the_host(kind: Kind) -> None:
    """Fake tensors have no data: to look at one raises."""
    tree = random_tree(1, 12, 4, 3, spine=3)
    token_keys.cache_clear()
    with FakeTensorMode():
        depths, parents = torch.zeros(2, len(tree), dtype=torch.long)
        ancestors = torch.zeros(len(tree), len(tree), dtype=torch.bool)
        tensors = TreeTensors(parents, depths, ancestors, tree.depth)
        candidates = torch.zeros(len(tree), dtype=torch.long)
        logits = torch.zeros(len(tree), 50)
        rule = Rule(kind, Numbers(*torch.zeros(len(Numbers._fields)).double().unbind()))
        verdict = rule(logits, candidates, tensors, torch.zeros((), dtype=torch.long))
        assert verdict.row.shape == verdict.next.shape == ()
        assert path_to(verdict.row, tensors).shape == (tree.depth + 1,)
    token_keys.cache_clear()


# ---- noise ----


def test_gumbel_noise_has_the_right_moments_and_quantiles() -> None:
    noise = torch.cat(
        [noise_at(seed, position, 1000) for seed in range(10) for position in range(30)]
    ).double()
    n = len(noise)
    assert abs(float(noise.mean()) - 0.577216) < 5 * (math.pi**2 / 6 / n) ** 0.5
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    distance = (uniform - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) < 1.95 / n**0.5  # Kolmogorov and Smirnov, 99.9%


def test_noise_of_neighbouring_keys_is_unrelated() -> None:
    base = noise_at(5, 100, 20_000)
    for seed, position in [
        (6, 100),
        (5, 101),
        (4, 101),
        (5, 100 + 2**20),
        (2**32 - 1, 100),
        (0, 0),
    ]:
        other = noise_at(seed, position, 20_000)
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 5 / 20_000**0.5
        assert len(set(base.tolist()) & set(other.tolist())) < 40  # chance hits of float32 alone
    shifted = torch.corrcoef(torch.stack([base[1:], base[:-1]]))[0, 1]
    assert abs(float(shifted)) < 5 / 20_000**0.5


def test_noise_is_keyed_by_seed_position_and_token_alone() -> None:
    assert torch.equal(noise_at(1, 2, 100), noise_at(1, 2, 100))
    assert torch.equal(noise_at(1, 2, 100)[:40], noise_at(1, 2, 40))
    assert (
        len(
            {
                tuple(noise_at(seed, position, 4).tolist())
                for seed in range(40)
                for position in range(40)
            }
        )
        == 1600
    )
    assert torch.isfinite(noise_at(3, 4, 300_000)).all()


def test_the_rules_do_not_change_what_they_are_given() -> None:
    for mode in ("greedy", "typical", "exact"):
        logits, candidates, tree = random_step(1, 12, 10, 1.0)
        before = logits.clone(), candidates.clone()
        sampling = Sampling(mode=mode, top_p=0.8, top_k=5)
        make_rule(sampling)(logits, candidates, TreeTensors.of(tree, CPU), 3)
        assert torch.equal(logits, before[0])
        assert torch.equal(candidates, before[1])
