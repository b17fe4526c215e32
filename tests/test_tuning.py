"""The choice of the tree: growth against brute force, step costs, measurement."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.config import UserError
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees import choice as tuning
from medusa_chat.decoding.trees.accuracy import (
    PUBLISHED,
    Accuracy,
    grow,
    read_accuracy,
    write_accuracy,
)
from medusa_chat.decoding.trees.choice import (
    Option,
    StepCost,
    fastest,
    measure,
    rising,
    static_options,
)
from medusa_chat.decoding.trees.tree import Tree
from tests.helpers.tiny import (
    OracleHeads,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    reply,
)

if TYPE_CHECKING:
    from pathlib import Path

rows = st.lists(st.floats(0.0, 1.0, width=16), min_size=1, max_size=3).map(
    lambda row: tuple(sorted(row))
)
tops = st.lists(rows, min_size=1, max_size=2).map(tuple)


def with_some_paths(top: Any, seed: int) -> Accuracy:
    """Some paths measured, each no more frequent than its prefix and none rarer than those that were not."""
    draw, shares = random.Random(seed), {(): 1.0}
    for path in every_path(top):
        shares[path] = shares[path[:-1]] * draw.choice((0.0, draw.random()))
    ranked = sorted(every_path(top), key=lambda path: (-shares[path], len(path)))
    return Accuracy(top, {path: shares[path] for path in ranked[: draw.randrange(len(ranked) + 1)]})


accuracies = st.one_of(tops.map(Accuracy), st.builds(with_some_paths, tops, st.integers(0, 10**6)))


def every_path(top: Any) -> list[tuple[int, ...]]:
    depths = range(1, len(top) + 1)
    return [
        path
        for depth in depths
        for path in itertools.product(*(range(len(row)) for row in top[:depth]))
    ]


def value(path: tuple[int, ...], accuracy: Accuracy) -> float:
    """Chance that every guess along the path is right: as measured, else heads taken as independent from there."""
    share = 1.0
    for depth in range(1, len(path) + 1):
        if path[:depth] in accuracy.paths:
            share = accuracy.paths[path[:depth]]
            continue
        row, rank = accuracy.top[depth - 1], path[depth - 1]
        share *= row[rank] - (row[rank - 1] if rank else 0.0)
        share = min([share, *accuracy.paths.values()])
    return share


def best_by_brute_force(accuracy: Accuracy, nodes: int) -> float:
    """Forecast of the best prefix-closed set of `nodes` nodes, root included, over all there are."""
    paths = every_path(accuracy.top)
    forecasts = [
        1 + sum(value(path, accuracy) for path in chosen)
        for chosen in itertools.combinations(paths, min(nodes - 1, len(paths)))
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    ]
    return max(forecasts)


@given(accuracy=accuracies, nodes=st.integers(1, 6))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_growth_finds_the_best_tree(accuracy: Any, nodes: Any) -> None:
    tree, forecast = grow(accuracy, nodes)
    assert len(tree) == len(forecast) <= nodes
    assert forecast[-1] == pytest.approx(best_by_brute_force(accuracy, nodes))
    assert forecast == sorted(forecast)
    assert accuracy.forecast(tree) == pytest.approx(forecast[-1])
    for stage in range(1, len(tree) + 1):
        smaller = grow(accuracy, stage)[0]
        assert set(smaller.paths) <= set(tree.paths)
        assert forecast[stage - 1] == pytest.approx(
            1 + sum(value(path, accuracy) for path in smaller.paths[1:])
        )


def test_growth_by_hand() -> None:
    """A plateau in the measurements (nobody's second guess was right) must not hide the third guess."""
    tree, forecast = grow(Accuracy(((0.5, 0.5, 0.75), (0.4,))), 5)
    assert set(tree.paths) == {(), (0,), (2,), (0, 0), (2, 0)}
    assert forecast == pytest.approx([1.0, 1.5, 1.75, 1.95, 2.05])
    published, lengths = grow(PUBLISHED, 64)
    assert len(published) == 64
    assert lengths[-1] == pytest.approx(
        2.35, abs=0.1
    )  # third parties measure 2.31 to 2.39 with these heads


costs = st.builds(
    lambda base, slope, knee: {
        n: base + slope * n + (0.5 if n > knee else 0.0) for n in (2, 4, 8, 16)
    },
    st.floats(0.9, 1.5),
    st.floats(0.0, 0.3),
    st.integers(1, 20),
)


@given(accuracy=accuracies, by_nodes=costs)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_fastest_tree_has_the_most_tokens_per_second(accuracy: Any, by_nodes: Any) -> None:
    cost = StepCost(0.5, by_nodes)
    options = static_options(accuracy, cost)
    whole, forecast = grow(accuracy, 16)
    assert [option.nodes for option in options] == list(range(2, len(whole) + 1))
    best = fastest(options)
    assert best.rate == pytest.approx(
        max(forecast[n - 1] / cost.seconds(n) for n in range(2, len(whole) + 1))
    )
    assert best.length == pytest.approx(accuracy.forecast(grow(accuracy, best.nodes)[0]))
    assert best.seconds == pytest.approx(0.5 * cost.overhead(best.nodes))


def test_a_steep_cost_makes_the_tree_small_and_a_flat_one_large() -> None:
    steep = StepCost(1.0, {2: 1.0, 4: 3.0, 64: 60.0})
    flat = StepCost(1.0, {2: 1.0, 4: 1.0, 64: 1.0})
    assert fastest(static_options(PUBLISHED, steep)).nodes == 2
    assert fastest(static_options(PUBLISHED, flat)).nodes == 64


def test_the_fastest_of_several_kinds() -> None:
    static = static_options(PUBLISHED, StepCost(1.0, {2: 1.0, 16: 1.3}))
    best = fastest(static)
    better = Option("dynamic", 8, 1.02 * best.length, best.seconds)
    assert fastest([*static, better]) is better
    assert fastest([*static, Option("dynamic", 8, 1.02 * best.length, 1.05 * best.seconds)]) == best


def test_step_cost_is_interpolated_between_measured_counts() -> None:
    cost = StepCost(0.5, {4: 2.0, 2: 1.0, 8: 2.0})
    assert [cost.overhead(n) for n in (2, 3, 4, 6, 8)] == [2.0, 3.0, 4.0, 4.0, 4.0]
    assert StepCost(0.5, {2: 1.0}).overhead(2) == 2.0
    assert StepCost(0.5, {8: 1.0, 32: 2.0}).overhead(3) == 2.0  # no cheaper than was measured
    assert (cost.seconds(9), cost.most) == (2.0, 8)


@given(values=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8), data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_rising_is_the_nearest_rising_sequence(values: Any, data: Any) -> None:
    found = rising(values)
    assert found == sorted(found)
    other = sorted(
        data.draw(st.lists(st.floats(0.1, 10.0), min_size=len(values), max_size=len(values)))
    )

    def distance(candidate: Any) -> Any:
        return sum((a - b) ** 2 for a, b in zip(candidate, values, strict=True))

    assert distance(found) <= distance(other) + 1e-9
    assert distance(found) <= distance(sorted(values)) + 1e-9


# ---- measuring, with a clock of our own ----


class ScriptedRunner:
    """Steps that take what `law(nodes, number of steps of that kind before)` says, on its own clock."""

    def __init__(self, law: Any) -> None:
        self.law, self.now, self.taken = law, 0.0, Counter()
        self.backbone = SimpleNamespace(context=512)
        self.cache = SimpleNamespace(capacity=1024, length=0, fill=self._to, rewind=self._to)

    def _to(self, length: int) -> None:
        self.cache.length = length

    def clock(self) -> float:
        return self.now

    def prefill(self, tokens: Any, rule: Any) -> None:
        self.cache.length += len(tokens)

    def step(self, root: Any, tree: Any, rule: Any, copied: Any = None) -> None:
        assert self.cache.length == tuning.TIMED_LENGTH
        self.now += self.law(len(tree), self.taken[len(tree)])
        self.taken[len(tree)] += 1
        self.cache.length += 1

    def measured(self, accuracy: Accuracy = PUBLISHED) -> StepCost:
        return measure(self, accuracy, clock=self.clock)


def staircase(nodes: int) -> float:
    return 1.0 if nodes == 1 else 1.2 if nodes <= 8 else 1.5 if nodes <= 32 else 2.0


def test_every_count_is_timed_in_turn() -> None:
    runner = ScriptedRunner(lambda nodes, before: 0.001 * (1.2 + nodes / 2000 if nodes > 1 else 1))
    cost = runner.measured(
        Accuracy(((0.5, 0.8, 0.9), (0.4, 0.7), (0.3, 0.6), (0.3, 0.5), (0.2, 0.4)))
    )
    assert cost.vanilla == pytest.approx(0.001)
    assert cost.by_nodes == pytest.approx(
        {n: 0.001 * (1.2 + n / 2000) for n in sorted(tuning.LADDER)}
    )
    # Each time in twos.
    assert [runner.taken[nodes] for nodes in (1, 64, 32)] == [2 * (tuning.REPEATS + 2)] + [
        2 * (tuning.REPEATS + 1)
    ] * 2
    assert runner.taken[2] // 2 - 1 < tuning.JUDGED  # at so flat a cost, the smallest cannot win
    assert runner.cache.length == 0


def test_quick_steps_are_timed_behind_steps_of_as_many_nodes() -> None:
    """The first of two takes more, as it does where caches hold what a step of another number left."""
    runner = ScriptedRunner(
        lambda nodes, before: 0.001 * staircase(nodes) * (1.25 if before % 2 == 0 else 1)
    )
    cost = runner.measured()
    assert cost.vanilla == pytest.approx(0.001)
    assert cost.by_nodes == pytest.approx({n: 0.001 * staircase(n) for n in sorted(tuning.LADDER)})
    slow = ScriptedRunner(lambda nodes, before: tuning.QUICK * staircase(nodes))
    slow.measured()
    assert slow.taken[1] <= tuning.REPEATS + 2


def test_preparation_is_no_part_of_the_cost() -> None:
    """Half a second before each count's first step, as a captured graph takes, spends the budget at once."""
    runner = ScriptedRunner(
        lambda nodes, before: 0.01 * staircase(nodes) + (0.5 if before == 0 else 0.0)
    )
    cost = runner.measured()
    assert cost.by_nodes == pytest.approx({n: 0.01 * staircase(n) for n in sorted(tuning.LADDER)})
    assert runner.now < 0.5 * 11 + 0.5


def test_what_disturbs_the_machine_or_flatters_one_count_does_not_decide() -> None:
    draw = random.Random(0)

    def law(nodes: int, before: int) -> float:
        return (
            0.001
            * staircase(nodes)
            * (3 if draw.random() < 0.3 else 1)
            * (0.2 if before == 13 else 1)
        )

    runner = ScriptedRunner(law)
    cost = runner.measured()
    assert cost.vanilla == pytest.approx(0.001)
    assert cost.by_nodes == pytest.approx({n: 0.001 * staircase(n) for n in sorted(tuning.LADDER)})


def test_a_count_that_was_lucky_all_along_is_not_taken_at_its_word() -> None:
    runner = ScriptedRunner(
        lambda nodes, before: 0.001 * staircase(nodes) * (0.7 if nodes == 12 else 1)
    )
    by_nodes = runner.measured().by_nodes
    assert list(by_nodes.values()) == sorted(by_nodes.values())
    assert by_nodes[12] > 0.0011
    assert by_nodes[32] == pytest.approx(0.0015)


@pytest.mark.parametrize(
    ("vanilla", "counts", "limit"), [(0.1, 6, 1.9), (0.4, 2, 2.3), (10.0, 2, 50.0)]
)
def test_a_slow_model_is_timed_at_fewer_counts(vanilla: Any, counts: Any, limit: Any) -> None:
    runner = ScriptedRunner(lambda nodes, before: vanilla * staircase(nodes))
    cost = runner.measured()
    assert len(cost.by_nodes) >= counts
    assert runner.now <= limit
    assert cost.by_nodes == pytest.approx({n: vanilla * staircase(n) for n in cost.by_nodes})
    assert cost.vanilla == vanilla
    assert fastest(static_options(PUBLISHED, cost)).nodes <= cost.most


def test_counts_that_cannot_win_are_left_alone() -> None:
    runner = ScriptedRunner(lambda nodes, before: 0.001 * (1.2 if nodes < 20 else 6.0))
    cost = runner.measured()
    assert max(runner.taken[nodes] for nodes in (24, 32, 48, 64)) == 2 * tuning.JUDGED
    assert runner.taken[16] > 10
    assert fastest(static_options(PUBLISHED, cost)).nodes <= 16


def test_heads_that_fill_few_nodes_are_timed_at_those() -> None:
    runner = ScriptedRunner(lambda nodes, before: 1.0)
    assert set(runner.measured(Accuracy(((0.5, 0.6),))).by_nodes) == {2, 3}


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
def test_poor_heads_still_get_a_tree(accuracy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "REPEATS", 1)
    backbone = random_backbone()
    engine = make_engine(
        backbone, random_heads(backbone, len(accuracy)), "auto", accuracy=Accuracy(accuracy)
    )
    assert len(engine.tree) >= 2
    prompt = prompt_ids(9)
    expected = reply(make_engine(backbone), prompt, mode="vanilla", max_new_tokens=20)
    assert reply(engine, prompt, max_new_tokens=20) == expected


def test_measurement_times_every_count_and_leaves_the_cache_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "REPEATS", 1)
    backbone = random_backbone(max_position_embeddings=48)
    runner = Runner(backbone, random_heads(backbone), 48 + 256)
    cost = measure(runner, PUBLISHED.pruned(4, 64))
    assert runner.cache.length == 0
    assert set(cost.by_nodes) <= set(tuning.LADDER)
    assert len(cost.by_nodes) > 1
    assert cost.vanilla > 0
    assert min(cost.by_nodes.values()) > 0


@pytest.mark.parametrize("call", [1, 3])
def test_an_interrupted_measurement_leaves_the_cache_empty(
    monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    backbone = random_backbone()
    runner = Runner(backbone, random_heads(backbone), 512)
    original, calls = backbone.logits, itertools.count(1)

    def interrupted(hidden: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(hidden)

    monkeypatch.setattr(backbone, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(runner, PUBLISHED.pruned(4, 64))
    assert runner.cache.length == 0


def test_switching_to_auto_in_a_conversation_keeps_replies_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "REPEATS", 1)
    backbone, prompt = random_backbone(), prompt_ids(9)
    expected = reply(make_engine(backbone), prompt, mode="vanilla", max_new_tokens=40)
    engine = make_engine(
        backbone, OracleHeads(4, 64, prompt + expected), "chain-2", accuracy=PUBLISHED
    )
    steps = reply(engine, prompt, max_new_tokens=20)
    engine.use_tree("auto")
    assert engine.tree.origin == "auto"
    assert steps + reply(engine, prompt + steps, max_new_tokens=20) == expected


# ---- the file of accuracies ----


def test_accuracies_are_read_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "head_accuracy.json"
    assert read_accuracy(file) is None
    file.write_text(json.dumps({"accuracy": [[0.5, 0.6], [0.25, 1]], "extra": 1}))
    assert read_accuracy(file) == Accuracy(
        ((0.5, 0.6), (0.25, 1.0))
    )  # as written before paths were
    accuracy = Accuracy(((0.5, 0.6), (0.25, 1 / 3)), {(0,): 0.48, (1,): 0.1, (0, 1): 0.1})
    write_accuracy(accuracy, file, "test")
    assert read_accuracy(file) == Accuracy(((0.5, 0.6), (0.25, 0.33333)), accuracy.paths)
    assert [each.name for each in tmp_path.iterdir()] == ["head_accuracy.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"accuracy": []}',
        '{"accuracy": [[]]}',
        '{"accuracy": [[0.5, 0.4]]}',
        '{"accuracy": [[1.5]]}',
        '{"accuracy": [[-0.5]]}',
        '{"accuracy": [["x"]]}',
        '{"accuracy": 3}',
        '{"accuracy": [[NaN]]}',
        '{"accuracy": [[0.1, NaN, 0.2]]}',
        '{"accuracy": [[1' + "0" * 400 + "]]}",
        "[" * 10**5,
        *(
            f'{{"accuracy": [[0.5, 0.6]], "paths": {paths}}}'
            for paths in (
                "null",
                "3",
                "[3]",
                "[[0]]",
                "[[[], 0.5]]",
                "[[[2], 0.5]]",
                "[[[-1], 0.5]]",
                "[[[0, 0], 0.5]]",
                "[[[0], 1.5]]",
                "[[[0], NaN]]",
                '[["0", 0.5]]',
                "[[[0.0], 0.5]]",
                "[[[true], 0.5]]",
                '[[[0], "x"]]',
            )
        ),
        '{"accuracy": [[0.5], [0.5]], "paths": [[[0], 0.3], [[0, 0], 0.4]]}',
        '{"accuracy": [[0.5], [0.5]], "paths": [[[0, 0], 0.4]]}',
    ],
)
def test_a_broken_file_of_accuracies_is_refused(text: Any, tmp_path: Path) -> None:
    file = tmp_path / "head_accuracy.json"
    file.write_text(text)
    with pytest.raises(UserError, match="calibrate") as refusal:
        read_accuracy(file)
    assert "\n" not in str(refusal.value)


def test_a_tree_of_the_root_alone_is_vanilla() -> None:
    assert grow(Accuracy(((0.5,),)), 1) == (Tree.of([], "auto"), [1.0])


# ---- paths that were measured together ----


def test_measured_paths_come_before_the_product() -> None:
    """The heads are right together: (0, 0) is better than the product says, (1, 0) worse."""
    top = ((0.5, 0.8), (0.4, 0.5))
    accuracy = Accuracy(top, {(0,): 0.5, (0, 0): 0.4, (1,): 0.3, (1, 0): 0.01})
    tree, forecast = grow(accuracy, 4)
    assert tree.paths == ((), (0,), (1,), (0, 0))
    assert forecast == pytest.approx([1.0, 1.5, 1.9, 2.2])
    # (0, 1) and (1, 1) were not measured: at most as frequent as the rarest that was.
    assert accuracy.frequency((0, 1)) == 0.01
    assert Accuracy(top, {(0,): 0.5}).frequency((0, 0)) == pytest.approx(0.5 * 0.4)
    assert accuracy.forecast(Tree.of([(0,), (7,), (0, 0), (0, 0, 0)])) == pytest.approx(
        1.9
    )  # nobody ranked the rest
    fewer = accuracy.pruned(1, 1)
    assert (fewer.top, fewer.paths) == (((0.5,),), {(0,): 0.5})


def test_a_tree_by_name_is_forecast_where_the_heads_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "REPEATS", 1)
    backbone = random_backbone()
    accuracy = Accuracy(((0.5, 0.8), (0.4, 0.5)), {(0,): 0.5, (0, 0): 0.4})
    engine = make_engine(backbone, random_heads(backbone, 2), "chain-2", accuracy=accuracy)
    assert engine.describe_tree() == "chain of 2: 3 nodes, depth 2; forecast 1.90 tokens a step"
    engine.use_tree("auto")
    assert f"forecast {accuracy.forecast(engine.tree):.2f} tokens a step" in engine.describe_tree()
