"""The choice of the tree: step costs, and the fastest tree that follows from them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.trees import costs
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.bookkeeping import MEMORY, USUAL, Bookkeeping
from medusa_chat.decoding.trees.choice import Option, StepCost, fastest, options
from medusa_chat.decoding.trees.growth import grow
from tests.helpers.accuracies import accuracies
from tests.helpers.tiny import (
    OracleHeads,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    reply,
)


def static_options(accuracy: Accuracy, cost: StepCost) -> list[Option]:
    return options(accuracy, {"static": cost})


by_nodes = st.builds(
    lambda base, slope, knee: {
        n: base + slope * n + (0.5 if n > knee else 0.0) for n in (2, 4, 8, 16)
    },
    st.floats(0.9, 1.5),
    st.floats(0.0, 0.3),
    st.integers(1, 20),
)


@given(accuracy=accuracies, by_nodes=by_nodes)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_fastest_tree_has_the_most_tokens_per_second(
    accuracy: Accuracy, by_nodes: dict[int, float]
) -> None:
    cost = StepCost(0.5, by_nodes)
    found = static_options(accuracy, cost)
    whole, forecast = grow(accuracy, 16)
    assert [option.nodes for option in found] == list(range(2, len(whole) + 1))
    best = fastest(found)
    assert best.rate == pytest.approx(
        max(forecast[n - 1] / cost.seconds(n) for n in range(2, len(whole) + 1))
    )
    assert best.length == pytest.approx(accuracy.forecast(grow(accuracy, best.nodes)[0]))
    assert best.seconds == cost.seconds(best.nodes)


def test_a_steep_cost_makes_the_tree_small_and_a_flat_one_large() -> None:
    steep = StepCost(1.0, {2: 1.0, 4: 3.0, 64: 60.0})
    flat = StepCost(1.0, {2: 1.0, 4: 1.0, 64: 1.0})
    assert fastest(static_options(PUBLISHED, steep)).nodes == 2
    assert fastest(static_options(PUBLISHED, flat)).nodes == 64


def test_time_beside_the_forward_makes_the_tree_larger() -> None:
    steep = {"static": StepCost(1.0, {n: 1.0 + n / 4 for n in range(2, 65)})}
    small, large = (fastest(options(PUBLISHED, steep, beside=each)) for each in (0.0, 5.0))
    assert small.nodes < large.nodes
    assert large.seconds == steep["static"].seconds(large.nodes) + 5.0


def test_bookkeeping_follows_the_steps_and_ignores_a_pause() -> None:
    kept = Bookkeeping()
    for _ in range(10 * MEMORY):
        kept.add("tree", 0.002)
    assert kept.of("tree") == pytest.approx(0.002, rel=1e-3)
    kept.add("tree", 60.0)  # the machine slept
    assert kept.of("tree") < 0.0021
    assert kept.of("vanilla") == USUAL["vanilla"]
    hidden = Bookkeeping(hidden=True)
    hidden.add("tree", 0.002)
    assert hidden.of("tree") == 0.0


def test_the_fastest_of_several_kinds() -> None:
    static = static_options(PUBLISHED, StepCost(1.0, {2: 1.0, 16: 1.3}))
    best = fastest(static)
    better = Option("dynamic", 8, 1.02 * best.length, best.seconds)
    assert fastest([*static, better]) is better
    assert fastest([*static, Option("dynamic", 8, 1.02 * best.length, 1.05 * best.seconds)]) == best


def test_step_cost_is_interpolated_between_measured_counts() -> None:
    cost = StepCost(0.5, {4: 2.0, 2: 1.0, 8: 2.0})
    assert [cost.seconds(n) for n in (2, 3, 4, 6, 8)] == [1.0, 1.5, 2.0, 2.0, 2.0]
    assert StepCost(0.5, {2: 1.0}).seconds(2) == 1.0
    assert StepCost(0.5, {8: 1.0, 32: 2.0}).seconds(3) == 1.0  # no cheaper than was measured
    assert (cost.seconds(9), cost.most) == (2.0, 8)


@pytest.mark.parametrize(
    "accuracy",
    [
        ((0.0,),),
        ((0.0, 0.0), (0.5, 0.6)),
        ((0.4,),),
        ((0.4, 0.5),),
        ((0.4,), (0.0,)),
        ((1.0,), (1.0,)),
    ],
)
def test_poor_heads_still_get_a_tree(
    accuracy: tuple[tuple[float, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "REPEATS", 1)
    backbone = random_backbone()
    engine = make_engine(
        backbone, random_heads(backbone, len(accuracy)), "auto", accuracy=Accuracy(accuracy)
    )
    assert len(engine.trees.current) >= 2
    prompt = prompt_ids(9)
    expected = reply(
        make_engine(backbone), prompt, mode="vanilla", temperature=0, max_new_tokens=20
    )
    assert reply(engine, prompt, max_new_tokens=20) == expected


def test_switching_to_auto_in_a_conversation_keeps_replies_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "REPEATS", 1)
    backbone = random_backbone()
    prompt = prompt_ids(9)
    expected = reply(
        make_engine(backbone), prompt, mode="vanilla", temperature=0, max_new_tokens=40
    )
    engine = make_engine(
        backbone, OracleHeads(4, 64, prompt + expected), "chain-2", accuracy=PUBLISHED
    )
    steps = reply(engine, prompt, max_new_tokens=20)
    engine.trees.use("auto")
    assert engine.trees.current.origin == "auto"
    assert steps + reply(engine, prompt + steps, max_new_tokens=20) == expected
