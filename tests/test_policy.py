"""What steps verify as a conversation goes: accuracies that are learned, trees that follow, heads that rest."""

from __future__ import annotations

import random
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.config import Sampling
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.trees import costs as cost_cache
from medusa_chat.decoding.trees import pause as gate
from medusa_chat.decoding.trees import policy
from medusa_chat.decoding.trees import tracker as online
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.choice import StepCost
from medusa_chat.decoding.trees.pause import Evidence, Gate
from medusa_chat.decoding.trees.policy import VANILLA, Policy
from medusa_chat.decoding.trees.tracker import MISSED, GuessTracker, OnlineAccuracy
from medusa_chat.decoding.trees.tree import Tree, chain
from medusa_chat.events import Step, Token
from medusa_chat.stats import Stats
from tests.helpers.tiny import (
    OracleHeads,
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    reply,
)

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine

FLAT = StepCost(1.0, {2: 1.2, 16: 1.2, 64: 3.0})  # 16 nodes cost as much as 2
PROMPT = prompt_ids(12)


# ---- accuracies learned from the conversation ----

PATHS = {(0,): 0.5, (1,): 0.2, (0, 0): 0.3, (0, 1): 0.1, (1, 0): 0.05}
BEFORE = Accuracy(((0.5, 0.75), (0.4, 0.5)), PATHS)
ranks = st.integers(MISSED, 3)


def plain_count(
    steps: list[tuple[int, ...]], memory: float, path: tuple[int, ...]
) -> tuple[float, float]:
    """Faded number of the steps in which the path held, and of all."""
    weights = [((memory - 1) / memory) ** age for age in reversed(range(len(steps)))]
    held = [
        weight
        for weight, step in zip(weights, steps, strict=True)
        if tuple(step[: len(path)]) == path
    ]
    return sum(held), sum(weights)


@given(steps=st.lists(st.tuples(ranks, ranks), max_size=60), memory=st.sampled_from([3, 20, 1000]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_paths_are_counted_and_fade(steps: Any, memory: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "MEMORY", memory)
        patch.setattr(online, "PRIOR", 7)
        learned = OnlineAccuracy(BEFORE)
        for step in steps:
            learned.add(step)
        assert learned.seen == len(steps)
        for path, before in PATHS.items():
            held, every = plain_count(steps, memory, path)
            assert learned.frequency(path) == pytest.approx(
                (held + 7 * before) / (every + 7), rel=1e-3
            )
        for path in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]:
            assert 0 <= learned.frequency(path) <= learned.frequency(path[:-1]) + 1e-12 <= 1 + 1e-9


def test_ranks_of_each_head_tell_of_paths_that_nobody_measured() -> None:
    """Head 2 is right whatever head 1 says: a path that was never seen whole becomes likelier by that."""
    learned = OnlineAccuracy(Accuracy(((0.5, 0.6), (0.2, 0.3))))
    before = learned.frequency((1, 0))
    for _ in range(300):
        learned.add((0, 0))
    faded = plain_count([(0, 0)] * 300, online.MEMORY, (0,))[0]
    chances = [
        online.PRIOR * 0.1 / (faded + online.PRIOR),
        (faded + online.PRIOR * 0.2) / (faded + online.PRIOR),
    ]
    expected = online.PRIOR * chances[0] * chances[1] / (faded + online.PRIOR)
    assert learned.frequency((1, 0)) == pytest.approx(expected)
    assert learned.frequency((1, 0)) / learned.frequency((1,)) > 2 * before / 0.1


def test_counts_stay_finite_over_a_long_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "MEMORY", 4)
    learned = OnlineAccuracy(Accuracy(((0.5,),)))
    for _ in range(3000):  # 1.33 ** 3000 would be no number
        learned.add((MISSED,))
    for _ in range(200):
        learned.add((0,))
    assert learned.frequency((0,)) == pytest.approx(
        (4 + online.PRIOR * learned._updated().top[0][0]) / (4 + online.PRIOR)
    )


def test_guesses_are_compared_with_what_followed() -> None:
    heard = GuessTracker(OnlineAccuracy(PUBLISHED.pruned(3, 5)))
    counted = []
    heard.accuracy.add = counted.append  # type: ignore[method-assign]
    heard.begin()
    heard.observe(
        [10, 11], [[11, 1], [12, 2], [3, 13]]
    )  # two tokens kept: the second is head 1's first guess
    assert counted == []
    heard.observe([12], [])  # a vanilla step
    assert counted == []
    heard.observe([13, 14, 15, 16], [[14], [15], [16]])
    assert counted == [[0, 0, 1], [0, 0, 0]]
    heard.observe([17], [[18], [19], [20]])
    heard.observe([18, 9], [[0], [0], [0]])
    heard.begin()  # the reply ended before all was known
    heard.observe([18], [[20], [1], [19]])
    heard.observe([19, 20, 21], [])
    assert counted[2:] == [[MISSED, MISSED, MISSED]]


def recorded(engine: Engine) -> list[tuple[int, list[list[int]]]]:
    """Where each tree step of the engine began and what its heads guessed there, as it decodes."""
    steps, original = [], engine.runner.step

    def step(root: Any, tree: Any, rule: Any, copied: Any = None) -> Any:
        position = engine.runner.cache.length
        outcome = original(root, tree, rule, copied)
        if outcome.guesses:
            steps.append((position, outcome.guesses))
        return outcome

    engine.runner.step = step
    return steps


def test_a_conversation_is_counted_as_its_text_says() -> None:
    """Turns that end, one that was broken off, and one whose text was taken back and said again otherwise."""
    backbone = random_backbone()
    text = PROMPT + reply(make_engine(backbone), PROMPT, mode="vanilla", max_new_tokens=120)
    engine = make_engine(
        backbone, OracleHeads(3, 64, text, (0, 1, 4, -1)), "mc_sim_7b_63", probing=True
    )
    counted: list[list[int]] = []
    engine.policy.accuracy.add = counted.append
    steps, expected = recorded(engine), []

    def talk(prompt: list[int], stop_after: int | None = None, **settings: Any) -> list[int]:
        steps.clear()
        said: list[int] = []
        with closing(engine.generate(prompt, Sampling(**settings))) as replies:
            for number, made in enumerate(replies, 1):
                said += [
                    token.id for token in made.tokens[: made.settled]
                ]  # a closing token is no step's
                if number == stop_after:
                    break
        for position, guesses in steps:
            followed = (prompt + said)[position + 1 : position + 4]
            if len(followed) == 3:
                expected.append(
                    [
                        row.index(t) if t in row else MISSED
                        for row, t in zip(guesses, followed, strict=True)
                    ]
                )
        return said

    first = talk(PROMPT, max_new_tokens=40)
    talk(PROMPT + first + [5, 6, 7], max_new_tokens=30)
    talk(PROMPT + first, stop_after=4, max_new_tokens=30)
    talk(PROMPT + first[:9], mode="exact", temperature=1.0, seed=3, max_new_tokens=30)
    assert len(expected) > 25
    assert len({tuple(each) for each in expected}) > 10
    assert counted == expected


# ---- trees that follow ----


def step(settled: int, seconds: float, tree: Tree | None = None) -> Step:
    tokens = tuple(Token(1, "a", head) for head in range(settled))
    if tree is None:
        return Step(tokens, 1, seconds, "vanilla")
    return Step(tokens, len(tree), seconds, "tree", tree.depth)


def drive(
    used: Policy, steps: int, law: Any, overhead: float = 1.3, noise: float = 0.0, seed: int = 0
) -> list[Step]:
    """Let a policy choose steps whose tokens come from law(draw) and whose seconds from the overhead."""
    draw, taken = random.Random(seed), []
    for _ in range(steps):
        tree, paused = used.next()
        seconds = max(draw.gauss(1.0, noise), 0.1)
        if tree is VANILLA:
            made = Step((Token(1, "a", 0),), 1, seconds, "vanilla", paused=paused)
        else:
            made = step(min(law(draw), tree.depth) + 1, overhead * seconds, tree)
        used.record(made)
        taken.append(made)
    return taken


def adapting(cost: StepCost = FLAT, accuracy: Accuracy | None = None, heads: int = 4) -> Policy:
    made = Policy(accuracy, heads, 64, probing=True)
    made.adapt({"static": cost})
    made.begin(Sampling())
    return made


def test_the_tree_follows_the_conversation_at_the_same_node_count() -> None:
    """Heads whose truth stands at rank 2, which the published accuracies hold for rare."""
    backbone = random_backbone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cost_cache, "measure", lambda *_, **__: StepCost(1.0, {2: 1.0, 8: 1.0, 9: 9.0})
        )
        patch.setattr(policy, "RESHAPE", 16)
        patch.setattr(online, "PRIOR", 20)
        expected = reply(make_engine(backbone), PROMPT, mode="vanilla", max_new_tokens=300)
        engine = make_engine(backbone, OracleHeads(4, 64, PROMPT + expected, (2,)), "auto")
        before = engine.tree
        assert (2, 2) not in before.paths
        steps = decode(engine, PROMPT, max_new_tokens=300)
    assert ids_of(steps) == expected
    assert len(engine.tree) == len(before) == 8
    assert {(2,), (2, 2), (2, 2, 2), (2, 2, 2, 2)} <= set(engine.tree.paths)
    assert [each.settled for each in steps[-12:-2]] == [5] * 10
    assert max(each.settled for each in steps[:16]) < 5
    assert f"this conversation's {engine.policy.accuracy.seen} steps" in engine.describe_tree()


def test_a_named_tree_is_obeyed_but_learned_from() -> None:
    used = adapting()
    used.fix(chain(3))
    for _ in range(100):
        used.learn([1, 2], [[3], [4], [5], [6]], None)
    taken = drive(used, 200, lambda draw: 0)
    assert used.tree == chain(3)
    assert not any(each.paused for each in taken)
    assert used.accuracy.seen > 90
    assert used.describe().startswith(
        "chain of 3: 4 nodes, depth 3; measured 1.00 tokens a step, 0.77x over the last"
    )


def test_the_node_count_changes_when_the_forecast_does_and_only_then() -> None:
    cost = StepCost(1.0, {n: 1.0 + n / 40 for n in range(2, 65)})
    used = adapting(cost, Accuracy(((0.5, 0.6), (0.3, 0.4), (0.2, 0.3), (0.1, 0.2))))
    start, sizes, draw = len(used.tree), [], random.Random(1)
    for _ in range(1500):  # the law that was forecast: noise alone must not move it
        used.accuracy.add(
            [
                draw.choices((0, 1, MISSED), weights)[0]
                for weights in ((5, 1, 4), (3, 1, 6), (2, 1, 7), (1, 1, 8))
            ]
        )
        drive(used, 1, lambda draw: 1)
        sizes.append(len(used.tree))
    assert set(sizes) == {start}
    for _ in range(1500):
        used.accuracy.add(
            [draw.choice((0, 1)) for _ in range(4)]
        )  # right, but at either rank: many paths are worth it
        drive(used, 1, lambda draw: 2)
        sizes.append(len(used.tree))
    changes = [later for earlier, later in pairwise(sizes) if later != earlier]
    assert changes == sorted(changes)
    assert start + 8 <= changes[-1]
    assert len(changes) <= 12


@pytest.mark.parametrize("copies", [True, False])
def test_copies_that_hold_call_for_nodes_to_hold_them(copies: Any) -> None:
    """Heads that are never right, and copies that always are."""
    used = adapting(StepCost(1.0, {n: 1.0 + n / 40 for n in range(2, 65)}))
    assert len(used.tree) <= CHAIN
    for place in range(0, 400, 2):
        copied = Copied(tuple(range(place + 1, place + 1 + CHAIN)), (-0.1,) * CHAIN, 8)
        used.learn([place, place + 1], [[-9]] * 4, copied if copies else None)
        drive(used, 1, lambda draw: 3)
    assert (len(used.tree) > CHAIN) is copies
    used.forget_copies()
    drive(used, 2 * policy.RESHAPE, lambda draw: 1)
    assert len(used.tree) <= CHAIN


# ---- heads that do not pay ----


def test_useless_heads_rest_longer_and_longer() -> None:
    used = adapting()
    taken = drive(used, 3000, lambda draw: 0)
    rests, working = [], 0
    for before, each in zip([None, *taken], taken, strict=False):
        if each.paused and not (before and before.paused):
            rests.append(each.paused)
            assert working >= gate.LEAST_STEPS
            working = 0
        working += each.kind == "tree"
    assert [rest.retry_in for rest in rests] == [256, 512, 1024, 2048]
    assert all(rest.speedup == pytest.approx(1 / 1.3) for rest in rests)
    paused = [each.paused.retry_in for each in taken if each.paused]
    assert paused[:256] == list(range(256, 0, -1))
    assert "0.77x over the last" in str(rests[0]) and "trying again in 256 tokens" in str(rests[0])
    assert sum(each.kind == "tree" for each in taken) < 150


def test_heads_that_pay_again_come_back_and_are_trusted_again() -> None:
    used = adapting()
    drive(used, 200, lambda draw: 0)
    resting = drive(used, 1000, lambda draw: 2)
    assert resting[0].paused
    assert not resting[-1].paused
    assert sum(each.kind == "tree" for each in resting[-500:]) > 450
    worse = drive(used, 400, lambda draw: 0)
    assert next(each.paused for each in worse if each.paused).retry_in == gate.FIRST_REST


@pytest.mark.parametrize("seed", range(6))
def test_noise_does_not_shut_the_gate_on_heads_that_pay(seed: Any) -> None:
    """1.15x with a noisy machine and few tokens a step: hardly ever in doubt, over 2000 steps."""
    taken = drive(
        adapting(), 2000, lambda draw: draw.random() < 0.5, overhead=1.3, noise=0.15, seed=seed
    )
    assert not any(each.paused for each in taken)


@pytest.mark.parametrize("seed", range(6))
def test_heads_that_clearly_do_not_pay_are_found_out_in_spite_of_noise(seed: Any) -> None:
    taken = drive(
        adapting(), 400, lambda draw: draw.random() < 0.2, overhead=1.7, noise=0.15, seed=seed
    )
    assert any(each.paused for each in taken)


def test_little_evidence_is_no_verdict() -> None:
    evidence = Evidence()
    assert (evidence.length, evidence.speedup, evidence.best_case) == (None, None, float("inf"))
    tree = chain(2)
    for _ in range(gate.LEAST_STEPS + 1):
        evidence.add(step(1, 2.0, tree))
    assert evidence.best_case == float("inf")  # no vanilla step to compare with
    assert evidence.speedup is None
    few = Evidence()
    for _ in range(gate.LEAST_PROBES):
        few.add(step(1, 2.0, tree))
        few.add(step(1, 1.0))
    assert few.speedup == 0.5
    assert few.best_case == float("inf")  # too few steps
    for _ in range(gate.LEAST_STEPS):
        few.add(step(1, 2.0, tree))
    assert few.best_case < 1
    wild = Evidence()
    for ratio in (0.2, 5.0) * 10:
        wild.add(step(1, ratio, tree))
        wild.add(step(1, 1.0))
        wild.add(step(1, 1.0, tree))
    assert wild.best_case > 1


def test_a_reply_that_ends_is_not_compared_with_the_next() -> None:
    evidence = Evidence()
    evidence.add(Step((Token(1, "a", 0),), 3, 9.0, "tree", 2, "eos"))
    evidence.add(step(1, 1.0))
    assert not evidence.ratios


def test_another_way_of_decoding_gets_another_chance() -> None:
    used = adapting()
    drive(used, 100, lambda draw: 0)
    assert used.next()[1]
    used.begin(Sampling())
    assert used.next()[1]
    used.begin(Sampling(mode="vanilla"))
    assert used.next() == (VANILLA, None)  # as the user wants it
    used.begin(Sampling())
    assert used.next()[1]
    used.begin(Sampling(mode="typical"))
    assert used.next() == (used.tree, None)


def test_a_gate_opens_when_asked() -> None:
    shut = Gate()
    tree = chain(2)
    while not shut.paused:
        shut.record(step(1, 2.0, tree))
        shut.record(step(1, 1.0))
    assert not shut.evidence.lengths
    shut.open()
    assert shut.paused is None


class Clock:
    """Seconds that pass only where a step is taken: a vanilla one takes 1, a tree one `overhead`."""

    def __init__(self, engine: Engine, overhead: float) -> None:
        self.now, self.overhead, original = 0.0, overhead, engine.runner.step

        def timed(root: Any, tree: Any, rule: Any, copied: Any = None) -> Any:
            self.now += self.overhead if len(tree) > 1 else 1.0
            return original(root, tree, rule, copied)

        engine.runner.step = timed

    def perf_counter(self) -> float:
        return self.now


def test_the_engine_rests_useless_heads_and_takes_them_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy text stays that of vanilla decoding, and the speedup that is shown is that of the heads in use."""
    backbone = random_backbone()
    expected = reply(make_engine(backbone), PROMPT, mode="vanilla", max_new_tokens=400)
    monkeypatch.setattr(cost_cache, "measure", lambda *_, **__: FLAT)
    monkeypatch.setattr(gate, "FIRST_REST", 48)
    oracle = OracleHeads(4, 64, PROMPT + expected, (-1,))
    engine = make_engine(backbone, oracle, "auto", probing=True)
    monkeypatch.setattr("medusa_chat.decoding.engine.time", Clock(engine, overhead=1.5))
    steps, stats, described = [], Stats(), [""]
    for made in engine.generate(PROMPT, Sampling(max_new_tokens=400)):
        steps.append(made)
        stats.add(made)
        oracle.ranks = [0] if len(ids_of(steps)) > 100 else [-1]
        described.append(engine.describe_tree())
    assert ids_of(steps) == expected
    assert [bool(made.paused) for made in steps] == [
        "heads do not pay here" in text for text in described[:-1]
    ]
    first = next(number for number, made in enumerate(steps) if made.paused)
    assert gate.LEAST_STEPS <= first < 60
    assert stats.paused_steps == 48
    assert stats.paused is None
    tried = sum(made.kind == "tree" for made in steps[:first])
    assert steps[first].as_json()["paused"] == {
        "speedup": pytest.approx(2 / 3),
        "steps": tried,
        "retry_in": 48,
    }
    assert max(made.settled for made in steps[-20:]) == 5
    without = Stats.of([made for made in steps if not made.paused])
    assert (stats.speedup, stats.overhead) == (without.speedup, without.overhead)
    assert stats.overhead == pytest.approx(1.5)
    assert stats.as_json()["paused_steps"] == 48


def test_bench_measures_the_heads_even_where_they_do_not_pay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = random_backbone()
    expected = reply(make_engine(backbone), PROMPT, mode="vanilla", max_new_tokens=200)
    monkeypatch.setattr(cost_cache, "measure", lambda *_, **__: FLAT)
    engine = make_engine(
        backbone, OracleHeads(4, 64, PROMPT + expected, (-1,)), "auto", probing=False
    )
    monkeypatch.setattr("medusa_chat.decoding.engine.time", Clock(engine, overhead=3.0))
    steps = decode(engine, PROMPT, max_new_tokens=200)
    assert ids_of(steps) == expected
    assert {made.kind for made in steps} == {"tree"}
