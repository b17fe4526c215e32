"""Policy: accuracies learned from a conversation, trees that follow them, and paused heads."""

from __future__ import annotations

import random
from contextlib import closing
from functools import partial
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.draft.copies import CHAIN
from medusa_chat.decoding.draft.guesses import MISSED, Guesses
from medusa_chat.decoding.report import StepReport
from medusa_chat.decoding.trees import costs, pause, policy, tracker
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.choice import StepCost
from medusa_chat.decoding.trees.pause import PauseRule, speedup_bound
from medusa_chat.decoding.trees.policy import VANILLA, Choice, Policy
from medusa_chat.decoding.trees.tracker import GuessTracker, OnlineAccuracy
from medusa_chat.decoding.trees.tree import Tree, chain
from medusa_chat.events import Pause, Step, Token
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from tests.helpers.steps import surround_steps
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
    from collections.abc import Callable, Sequence

    from medusa_chat.decoding.runner import Runner
    from medusa_chat.decoding.trees.tree import AnyTree

FLAT = StepCost(1.0, {2: 1.2, 16: 1.2, 64: 3.0})  # 16 nodes cost as much as 2
SLOPE = StepCost(1.0, {n: 1.0 + n / 40 for n in range(2, 65)})
PROMPT = prompt_ids(12)


# ---- accuracies learned from the conversation ----

PATHS = {(0,): 0.5, (1,): 0.2, (0, 0): 0.3, (0, 1): 0.1, (1, 0): 0.05}
BEFORE = Accuracy(((0.5, 0.75), (0.4, 0.5)), PATHS)
ranks = st.integers(MISSED, 3)


def plain_count(
    steps: list[tuple[int, ...]], memory: float, path: tuple[int, ...]
) -> tuple[float, float]:
    """Faded number of the steps in which the path was right, and of all steps."""
    weights = [((memory - 1) / memory) ** age for age in reversed(range(len(steps)))]
    weighted = zip(weights, steps, strict=True)
    right = [weight for weight, step in weighted if tuple(step[: len(path)]) == path]
    return sum(right), sum(weights)


@given(steps=st.lists(st.tuples(ranks, ranks), max_size=60), memory=st.sampled_from([3, 20, 1000]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_paths_are_counted_and_fade(steps: list[tuple[int, ...]], memory: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "ACCURACY_MEMORY", memory)
        patch.setattr(tracker, "ACCURACY_PRIOR", 7)
        learned = OnlineAccuracy(BEFORE)
        for step in steps:
            learned.add(step)
        assert learned.seen == len(steps)
        for path, before in PATHS.items():
            right, every = plain_count(steps, memory, path)
            expected = (right + 7 * before) / (every + 7)
            assert learned.frequency(path) == pytest.approx(expected, rel=1e-3)
        for path in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]:
            assert 0 <= learned.frequency(path) <= learned.frequency(path[:-1]) + 1e-12 <= 1 + 1e-9


def test_the_ranks_of_each_head_update_paths_that_were_not_measured() -> None:
    """Head 2 is right whatever head 1 guesses, so a path that was never right as a whole gains."""
    learned = OnlineAccuracy(Accuracy(((0.5, 0.6), (0.2, 0.3))))
    before = learned.frequency((1, 0))
    for _ in range(300):
        learned.add((0, 0))
    prior = tracker.ACCURACY_PRIOR
    faded = plain_count([(0, 0)] * 300, tracker.ACCURACY_MEMORY, (0,))[0]
    first = prior * 0.1 / (faded + prior)
    second = (faded + prior * 0.2) / (faded + prior)
    assert learned.frequency((1, 0)) == pytest.approx(prior * first * second / (faded + prior))
    assert learned.frequency((1, 0)) / learned.frequency((1,)) > 2 * before / 0.1


def test_counts_stay_finite_over_a_long_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "ACCURACY_MEMORY", 4)
    learned = OnlineAccuracy(Accuracy(((0.5,),)))
    for _ in range(3000):  # 1.33 ** 3000 would overflow
        learned.add((MISSED,))
    for _ in range(200):
        learned.add((0,))
    prior = tracker.ACCURACY_PRIOR
    chance = (4 + prior * 0.5) / (4 + prior)
    assert learned.frequency((0,)) == pytest.approx((4 + prior * chance) / (4 + prior))


def test_guesses_are_compared_with_the_tokens_that_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracker, "COMPARED", 1)
    used = GuessTracker(OnlineAccuracy(PUBLISHED.pruned(3, 5)))
    counted: list[Sequence[int]] = []
    monkeypatch.setattr(used.accuracy, "add", counted.append)
    used.begin()
    # Two tokens stay: the second is head 1's first guess.
    used.observe([10, 11], told([[11, 1], [12, 2], [3, 13]]))
    assert counted == []
    used.observe([12], told([]))  # a vanilla step
    assert counted == []
    used.observe([13, 14, 15, 16], told([[14], [15], [16]]))
    assert counted == [[0, 0, 1], [0, 0, 0]]
    used.observe([17], told([[18], [19], [20]]))
    used.observe([18, 9], told([[0], [0], [0]]))
    used.begin()  # the reply ended before all was known
    used.observe([18], told([[20], [1], [19]]))
    used.observe([19, 20, 21], told([]))
    assert counted[2:] == [[MISSED, MISSED, MISSED]]


def test_one_step_in_four_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guesses of the others are not even read."""
    used = GuessTracker(OnlineAccuracy(PUBLISHED.pruned(1, 5)))
    counted: list[Sequence[int]] = []
    monkeypatch.setattr(used.accuracy, "add", counted.append)
    read: list[int] = []

    def guesses(number: int) -> Guesses:
        read.append(number)
        return Guesses([[number]])

    used.begin()
    for number in range(9):
        # Each step keeps two tokens; the second is a guess of the steps 0, 3, 6 alone.
        used.observe([0, number // 3 * 3], partial(guesses, number))
    assert tracker.COMPARED == 4
    assert read == [0, 4, 8]
    assert counted == [[0], [MISSED], [MISSED]]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[list[int]]]]:
    """Position and guesses of each tree step from here on."""
    steps: list[tuple[int, list[list[int]]]] = []

    def record(runner: Runner, _: AnyTree, finish: Callable[[], StepReport]) -> StepReport:
        position = runner.cache.length
        report = finish()
        if report.guesses.rows:
            steps.append((position, report.guesses.rows))
        return report

    surround_steps(monkeypatch, record)
    return steps


def test_a_conversation_is_counted_as_its_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies that end, one that is interrupted, and one that is partly kept and regenerated."""
    backbone = random_backbone()
    text = PROMPT + reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=120
    )
    monkeypatch.setattr(tracker, "COMPARED", 1)
    heads = OracleHeads(3, 64, text, (0, 1, 4, -1))
    engine = make_engine(backbone, heads, "mc_sim_7b_63", probing=True)
    counted: list[Sequence[int]] = []
    monkeypatch.setattr(OnlineAccuracy, "add", lambda _, ranks: counted.append(ranks))
    steps = recorded(monkeypatch)
    expected: list[list[int]] = []

    def talk(prompt: list[int], stop_after: int | None = None, **settings: Any) -> list[int]:
        steps.clear()
        said: list[int] = []
        with closing(engine.generate(prompt, Sampling(**settings))) as replies:
            for number, made in enumerate(replies, 1):
                # A closing token belongs to no step.
                said += [token.id for token in made.tokens[: made.settled]]
                if number == stop_after:
                    break
        for position, guesses in steps:
            followed = (prompt + said)[position + 1 : position + 4]
            if len(followed) == 3:
                pairs = zip(guesses, followed, strict=True)
                expected.append([row.index(t) if t in row else MISSED for row, t in pairs])
        return said

    first = talk(PROMPT, max_new_tokens=40)
    talk(PROMPT + first + [5, 6, 7], max_new_tokens=30)
    talk(PROMPT + first, stop_after=4, max_new_tokens=30)
    talk(PROMPT + first[:9], mode="typical", temperature=1.0, seed=3, max_new_tokens=30)
    assert len(expected) > 25
    assert len({tuple(each) for each in expected}) > 10
    assert counted == expected


# ---- trees that follow ----


def step(settled: int, seconds: float, tree: Tree | None = None) -> Step:
    tokens = tuple(Token(1, "a", head) for head in range(settled))
    if tree is None:
        return Step(tokens, 1, seconds, "vanilla")
    return Step(tokens, len(tree), seconds, "tree", tree.depth)


def told(guesses: list[list[int]]) -> Callable[[], Guesses]:
    """What a step tells of its heads."""
    return partial(Guesses, guesses)


def report(tokens: Sequence[int], guesses: list[list[int]], following: int = 1) -> StepReport:
    """The report of a step that accepted these tokens."""
    paths = tuple((0,) * depth for depth in range(len(tokens)))
    rows = tuple(range(len(tokens)))
    return StepReport(paths, list(tokens), rows, following, told(guesses))


def drive(
    used: Policy,
    steps: int,
    law: Callable[[random.Random], int],
    overhead: float = 1.3,
    noise: float = 0.0,
    seed: int = 0,
) -> list[Step]:
    """Let a policy choose steps, of law(draw) accepted guesses and with this overhead."""
    draw = random.Random(seed)
    taken = []
    for _ in range(steps):
        choice = used.next([], 1)
        seconds = max(draw.gauss(1.0, noise), 0.1)
        if isinstance(choice.tree, Tree) and choice.tree is not VANILLA:
            accepted = min(law(draw), choice.tree.depth)
            made = step(accepted + 1, overhead * seconds, choice.tree)
        else:
            made = Step((Token(1, "a", 0),), 1, seconds, "vanilla", paused=choice.pause)
        used.learn(report([token.id for token in made.tokens], []), made)
        taken.append(made)
    return taken


def adapting(
    cost: StepCost = FLAT, accuracy: Accuracy = PUBLISHED, *, copying: bool = False
) -> Policy:
    made = Policy(accuracy.pruned(4, 10), calibrated=accuracy is not PUBLISHED, copying=copying)
    made.adapt({"static": cost})
    made.begin(Sampling())
    return made


def test_the_tree_follows_the_conversation_at_the_same_node_count() -> None:
    """The heads' third guesses are right, which the published accuracies take for rare."""
    backbone = random_backbone()
    cost = StepCost(1.0, {2: 1.0, 8: 1.0, 9: 9.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "measure", lambda *_, **__: cost)
        patch.setattr(policy, "RESHAPE", 16)
        patch.setattr(tracker, "ACCURACY_PRIOR", 20)
        patch.setattr(tracker, "COMPARED", 1)
        expected = reply(
            make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=300
        )
        engine = make_engine(backbone, OracleHeads(4, 64, PROMPT + expected, (2,)), "auto")
        before = engine.trees.current
        assert isinstance(before, Tree)
        assert (2, 2) not in before.paths
        steps = decode(engine, PROMPT, max_new_tokens=300)
    assert ids_of(steps) == expected
    after = engine.trees.current
    assert isinstance(after, Tree)
    assert len(after) == len(before) == 8
    assert {(2,), (2, 2), (2, 2, 2), (2, 2, 2, 2)} <= set(after.paths)
    assert [each.settled for each in steps[-12:-2]] == [5] * 10
    assert max(each.settled for each in steps[:16]) < 5
    seen = engine.trees.policy.accuracy.seen
    assert f"{seen} steps of this conversation" in engine.trees.describe()


def test_a_named_tree_stays_but_the_policy_learns() -> None:
    used = adapting()
    used.fix(chain(3))
    for _ in range(100):
        used.learn(report([1, 1], [[3], [4], [5], [6]]), step(2, 1.0, chain(3)))
    taken = drive(used, 200, lambda _: 0)
    assert used.tree == chain(3)
    assert not any(each.paused for each in taken)
    assert used.accuracy.seen > 90 // tracker.COMPARED
    assert used.describe() == (
        "chain of 3: 4 nodes, depth 3; got 1.0 tokens per step (slower, 0.77x, last 64 steps)"
    )


def test_the_node_count_changes_when_the_forecast_does_and_only_then() -> None:
    used = adapting(SLOPE, Accuracy(((0.5, 0.6), (0.3, 0.4), (0.2, 0.3), (0.1, 0.2))))
    start = len(used.tree)
    sizes = []
    draw = random.Random(1)
    law = ((5, 1, 4), (3, 1, 6), (2, 1, 7), (1, 1, 8))
    for _ in range(1500):  # as was forecast: noise alone must not change the tree
        used.accuracy.add([draw.choices((0, 1, MISSED), weights)[0] for weights in law])
        drive(used, 1, lambda _: 1)
        sizes.append(len(used.tree))
    assert set(sizes) == {start}
    for _ in range(1500):  # right, but at either rank: many paths are worth a node
        used.accuracy.add([draw.choice((0, 1)) for _ in range(4)])
        drive(used, 1, lambda _: 2)
        sizes.append(len(used.tree))
    changes = [later for earlier, later in pairwise(sizes) if later != earlier]
    assert changes == sorted(changes)
    assert start + 8 <= changes[-1]
    assert len(changes) <= 12


@pytest.mark.parametrize("copying", [True, False])
def test_copies_that_are_right_call_for_nodes_to_hold_them(copying: bool) -> None:
    """Heads that are never right, in a text that repeats itself."""
    steep = StepCost(1.0, {n: 1.0 + n / 20 for n in range(2, 65)})
    used = adapting(steep, copying=copying)
    assert len(used.tree) <= CHAIN
    text: list[int] = []
    for _ in range(200 * tracker.COMPARED):
        root = len(text) % 12
        choice = used.next(text, root)
        if choice.tree is VANILLA:
            made = Step((Token(root, "a", 0),), 1, 1.0, "vanilla")
            taken = report([root], [], (root + 1) % 12)
        else:
            kept = (Token(root, "a", 0), Token((root + 1) % 12, "a", 1))
            made = Step(kept, len(choice.tree), 1.3, "tree")
            taken = report([token.id for token in kept], [[-9]] * 4, (root + 2) % 12)
        used.learn(taken, made)
        assert copying or choice.copied is None
        text += taken.tokens
    assert (len(used.tree) > CHAIN) is copying
    used.use_copies(False)
    drive(used, 2 * policy.RESHAPE, lambda _: 1)
    assert len(used.tree) <= CHAIN
    assert used.next(text, len(text) % 12).copied is None


# ---- heads that make decoding slower ----


def test_useless_heads_are_paused_longer_and_longer() -> None:
    used = adapting()
    taken = drive(used, 3000, lambda _: 0)
    pauses: list[Pause] = []
    working = 0
    for before, each in pairwise([None, *taken]):
        assert each is not None
        if each.paused and not (before and before.paused):
            pauses.append(each.paused)
            assert working >= pause.LEAST_STEPS
            working = 0
        working += each.kind == "tree"
    assert [each.retry_in for each in pauses] == [256, 512, 1024, 2048]
    assert all(each.speedup == pytest.approx(1 / 1.3) for each in pauses)
    left = [each.paused.retry_in for each in taken if each.paused]
    assert left[:256] == list(range(256, 0, -1))
    assert str(pauses[0]) == "heads are slower here (0.77x): off for 256 tokens"
    assert sum(each.kind == "tree" for each in taken) < 150


def test_heads_that_pay_again_come_back_and_are_trusted_again() -> None:
    used = adapting()
    drive(used, 200, lambda _: 0)
    later = drive(used, 1000, lambda _: 2)
    assert later[0].paused
    assert not later[-1].paused
    assert sum(each.kind == "tree" for each in later[-500:]) > 450
    worse = drive(used, 400, lambda _: 0)
    first = next(each.paused for each in worse if each.paused)
    assert first.retry_in == pause.FIRST_PAUSE


@pytest.mark.parametrize("seed", range(6))
def test_noise_does_not_pause_heads_that_pay(seed: int) -> None:
    """1.15x with a noisy machine and few tokens per step: never paused in 2000 steps."""
    used = adapting()
    taken = drive(used, 2000, lambda draw: draw.random() < 0.5, overhead=1.3, noise=0.15, seed=seed)
    assert not any(each.paused for each in taken)


@pytest.mark.parametrize("seed", range(6))
def test_heads_that_are_clearly_slower_are_paused_in_spite_of_noise(seed: int) -> None:
    used = adapting()
    taken = drive(used, 400, lambda draw: draw.random() < 0.2, overhead=1.7, noise=0.15, seed=seed)
    assert any(each.paused for each in taken)


def test_few_steps_have_no_bound() -> None:
    stats = Stats(window=pause.WINDOW)
    assert (stats.acceptance_length, stats.speedup, speedup_bound(stats)) == (None, None, inf)
    tree = chain(2)
    for _ in range(pause.LEAST_STEPS + 1):
        stats.add(step(1, 2.0, tree))
    assert speedup_bound(stats) == inf  # no vanilla step to compare with
    assert stats.speedup is None
    few = Stats(window=pause.WINDOW)
    for _ in range(pause.LEAST_PROBES):
        few.add(step(1, 2.0, tree))
        few.add(step(1, 1.0))
    assert few.speedup == 0.5
    assert speedup_bound(few) == inf  # too few tree steps
    for _ in range(pause.LEAST_STEPS):
        few.add(step(1, 2.0, tree))
    assert speedup_bound(few) < 1
    wild = Stats(window=pause.WINDOW)
    for ratio in (0.2, 5.0) * 10:
        wild.add(step(1, ratio, tree))
        wild.add(step(1, 1.0))
        wild.add(step(1, 1.0, tree))
    assert speedup_bound(wild) > 1


def test_another_way_of_decoding_gets_another_chance() -> None:
    used = adapting()
    drive(used, 100, lambda _: 0)
    assert used.next([], 1).pause
    used.begin(Sampling())
    assert used.next([], 1).pause
    used.begin(Sampling(mode="vanilla", temperature=0))
    assert used.next([], 1) == Choice(VANILLA)  # the user's own choice
    used.begin(Sampling())
    assert used.next([], 1).pause
    used.begin(Sampling(mode="typical"))
    assert used.next([], 1) == Choice(used.tree)


def test_a_pause_ends_when_the_measurement_restarts() -> None:
    rule = PauseRule(probing=True)
    tree = chain(2)
    while not rule.pause:
        rule.add(step(1, 2.0, tree), may_pause=True)
        rule.add(step(1, 1.0), may_pause=True)
    assert rule.stats.steps == 0
    rule.restart()
    assert rule.pause is None


class Clock:
    """Seconds that pass only in steps: 1 in a vanilla step, `overhead` in a tree step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, overhead: float) -> None:
        self.now = 0.0

        def spend(_: Runner, tree: AnyTree, finish: Callable[[], StepReport]) -> StepReport:
            self.now += overhead if len(tree) > 1 else 1.0
            return finish()

        surround_steps(monkeypatch, spend)

    def perf_counter(self) -> float:
        return self.now


def test_the_engine_pauses_useless_heads_and_uses_them_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy text stays that of vanilla decoding; the shown speedup is that of the heads in use."""
    backbone = random_backbone()
    expected = reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=400
    )
    monkeypatch.setattr(costs, "measure", lambda *_, **__: FLAT)
    monkeypatch.setattr(pause, "FIRST_PAUSE", 48)
    oracle = OracleHeads(4, 64, PROMPT + expected, (-1,))
    engine = make_engine(backbone, oracle, "auto", probing=True)
    monkeypatch.setattr("medusa_chat.decoding.engine.time", Clock(monkeypatch, overhead=1.5))
    steps = []
    stats = Stats()
    described = [""]
    for made in engine.generate(PROMPT, Sampling(max_new_tokens=400)):
        steps.append(made)
        stats.add(made)
        oracle.ranks = [0] if len(ids_of(steps)) > 100 else [-1]
        described.append(engine.trees.describe())
    assert ids_of(steps) == expected
    paused = [bool(made.paused) for made in steps]
    assert paused == ["heads are slower here" in text for text in described[:-1]]
    first = paused.index(True)
    assert pause.LEAST_STEPS <= first < 60
    assert stats.paused_steps == 48
    assert stats.paused is None
    assert steps[first].as_json()["paused"] == {
        "speedup": pytest.approx(2 / 3),
        "steps": sum(made.kind == "tree" for made in steps[:first]),
        "retry_in": 48,
    }
    assert max(made.settled for made in steps[-20:]) == 5
    without = Stats.of([made for made in steps if not made.paused])
    assert (stats.speedup, stats.overhead) == (without.speedup, without.overhead)
    assert stats.overhead == pytest.approx(1.5)
    assert stats.as_json()["paused_steps"] == 48


def test_without_probes_useless_heads_are_not_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So bench measures the heads even where they make decoding slower."""
    backbone = random_backbone()
    expected = reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=200
    )
    monkeypatch.setattr(costs, "measure", lambda *_, **__: FLAT)
    heads = OracleHeads(4, 64, PROMPT + expected, (-1,))
    engine = make_engine(backbone, heads, "auto", probing=False)
    monkeypatch.setattr("medusa_chat.decoding.engine.time", Clock(monkeypatch, overhead=3.0))
    steps = decode(engine, PROMPT, max_new_tokens=200)
    assert ids_of(steps) == expected
    assert {made.kind for made in steps} == {"tree"}
