"""Measuring what steps cost, with a clock of our own and with real steps."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees import costs
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.choice import StepCost, fastest, options
from medusa_chat.decoding.trees.costs import measure, rising
from tests.helpers.tiny import random_backbone, random_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    from torch import Tensor


@given(values=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8), data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_rising_is_the_nearest_rising_sequence(values: list[float], data: Any) -> None:
    found = rising(values)
    assert found == sorted(found)
    other = sorted(
        data.draw(st.lists(st.floats(0.1, 10.0), min_size=len(values), max_size=len(values)))
    )

    def distance(candidate: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(candidate, values, strict=True))

    assert distance(found) <= distance(other) + 1e-9
    assert distance(found) <= distance(sorted(values)) + 1e-9


# ---- measuring, with a clock of our own ----


class ScriptedRunner:
    """Takes steps of law(nodes, earlier steps of as many nodes) seconds, on a clock of its own."""

    def __init__(self, law: Callable[[int, int], float]) -> None:
        self.law = law
        self.now = 0.0
        self.taken: Counter[int] = Counter()
        self.backbone = SimpleNamespace(context=512)
        self.cache = SimpleNamespace(capacity=1024, length=0)
        self.cache.fill = self.cache.rewind = partial(setattr, self.cache, "length")

    def clock(self) -> float:
        return self.now

    def prefill(self, tokens: list[int], *_: object) -> None:
        self.cache.length += len(tokens)

    def step(self, _root: int, tree: Sized, *_: object) -> None:
        assert self.cache.length == costs.TIMED_LENGTH
        self.now += self.law(len(tree), self.taken[len(tree)])
        self.taken[len(tree)] += 1
        self.cache.length += 1

    def measured(self, accuracy: Accuracy = PUBLISHED) -> StepCost:
        return measure(cast("Runner", self), accuracy, clock=self.clock)


def staircase(nodes: int) -> float:
    return 1.0 if nodes == 1 else 1.2 if nodes <= 8 else 1.5 if nodes <= 32 else 2.0


def test_every_count_is_timed_in_turn() -> None:
    def seconds(nodes: int, _: int = 0) -> float:
        return 0.001 * (1.2 + nodes / 2000) if nodes > 1 else 0.001

    runner = ScriptedRunner(seconds)
    top = ((0.5, 0.8, 0.9), (0.4, 0.7), (0.3, 0.6), (0.3, 0.5), (0.2, 0.4))
    cost = runner.measured(Accuracy(top))
    assert cost.vanilla == pytest.approx(0.001)
    assert cost.by_nodes == pytest.approx({n: seconds(n) for n in sorted(costs.LADDER)})
    # Quick steps are taken twice.
    assert runner.taken[1] == 2 * (costs.REPEATS + 2)
    assert runner.taken[64] == runner.taken[32] == 2 * (costs.REPEATS + 1)
    # With so flat a cost, the smallest count cannot win.
    assert runner.taken[2] // 2 - 1 < costs.LEAST_TIMES
    assert runner.cache.length == 0


def test_quick_steps_are_timed_after_steps_of_as_many_nodes() -> None:
    """The first of two takes longer, as it does after a step of another number of nodes."""
    runner = ScriptedRunner(
        lambda nodes, before: 0.001 * staircase(nodes) * (1.25 if before % 2 == 0 else 1)
    )
    cost = runner.measured()
    assert cost.vanilla == pytest.approx(0.001)
    assert cost.by_nodes == pytest.approx({n: 0.001 * staircase(n) for n in sorted(costs.LADDER)})
    slow = ScriptedRunner(lambda nodes, _: costs.QUICK * staircase(nodes))
    slow.measured()
    assert slow.taken[1] <= costs.REPEATS + 2


def test_preparation_is_no_part_of_the_cost() -> None:
    """The capture of a graph before each count's first step spends the budget at once."""
    runner = ScriptedRunner(
        lambda nodes, before: 0.01 * staircase(nodes) + (0.5 if before == 0 else 0.0)
    )
    cost = runner.measured()
    assert cost.by_nodes == pytest.approx({n: 0.01 * staircase(n) for n in sorted(costs.LADDER)})
    assert runner.now < 0.5 * 11 + 0.5


def test_what_disturbs_the_machine_or_flatters_one_count_does_not_decide() -> None:
    draw = random.Random(0)

    def law(nodes: int, before: int) -> float:
        disturbed = 3 if draw.random() < 0.3 else 1
        flattered = 0.2 if before == 13 else 1
        return 0.001 * staircase(nodes) * disturbed * flattered

    runner = ScriptedRunner(law)
    cost = runner.measured()
    assert cost.vanilla == pytest.approx(0.001)
    assert cost.by_nodes == pytest.approx({n: 0.001 * staircase(n) for n in sorted(costs.LADDER)})


def test_one_count_that_was_always_lucky_does_not_decide() -> None:
    runner = ScriptedRunner(lambda nodes, _: 0.001 * staircase(nodes) * (0.7 if nodes == 12 else 1))
    by_nodes = runner.measured().by_nodes
    assert list(by_nodes.values()) == sorted(by_nodes.values())
    assert by_nodes[12] > 0.0011
    assert by_nodes[32] == pytest.approx(0.0015)


@pytest.mark.parametrize(
    ("vanilla", "counts", "limit"), [(0.1, 6, 1.9), (0.4, 2, 2.3), (10.0, 2, 50.0)]
)
def test_a_slow_model_is_timed_at_fewer_counts(vanilla: float, counts: int, limit: float) -> None:
    runner = ScriptedRunner(lambda nodes, _: vanilla * staircase(nodes))
    cost = runner.measured()
    assert len(cost.by_nodes) >= counts
    assert runner.now <= limit
    assert cost.by_nodes == pytest.approx({n: vanilla * staircase(n) for n in cost.by_nodes})
    assert cost.vanilla == vanilla
    assert fastest(options(PUBLISHED, {"static": cost})).nodes <= cost.most


def test_counts_that_cannot_win_are_dropped() -> None:
    runner = ScriptedRunner(lambda nodes, _: 0.001 * (1.2 if nodes < 20 else 6.0))
    cost = runner.measured()
    assert max(runner.taken[nodes] for nodes in (24, 32, 48, 64)) == 2 * costs.LEAST_TIMES
    assert runner.taken[16] > 10
    assert fastest(options(PUBLISHED, {"static": cost})).nodes <= 16


def test_heads_that_fill_few_nodes_are_timed_at_those() -> None:
    runner = ScriptedRunner(lambda *_: 1.0)
    assert set(runner.measured(Accuracy(((0.5, 0.6),))).by_nodes) == {2, 3}


def test_measurement_times_every_count_and_leaves_the_cache_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "REPEATS", 1)
    backbone = random_backbone(max_position_embeddings=48)
    runner = Runner(backbone, random_heads(backbone), 48 + 256)
    cost = measure(runner, PUBLISHED.pruned(4, 64))
    assert runner.cache.length == 0
    assert set(cost.by_nodes) <= set(costs.LADDER)
    assert len(cost.by_nodes) > 1
    assert cost.vanilla > 0
    assert min(cost.by_nodes.values()) > 0


@pytest.mark.parametrize("call", [1, 3])
def test_an_interrupted_measurement_leaves_the_cache_empty(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    backbone = random_backbone()
    runner = Runner(backbone, random_heads(backbone), 512)
    original = backbone.logits
    calls = itertools.count(1)

    def interrupted(hidden: Tensor) -> Tensor:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(hidden)

    monkeypatch.setattr(backbone, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(runner, PUBLISHED.pruned(4, 64))
    assert runner.cache.length == 0
