"""Steps and their figures, against examples worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest

from medusa_chat.events import COPIED, Pause, Step, Token
from medusa_chat.stats import Speedup, Stats

if TYPE_CHECKING:
    from medusa_chat.events import Finish


def step(heads: list[int], seconds: float, *, nodes: int = 8, finish: Finish | None = None) -> Step:
    """A step whose tokens came from `heads`, of a tree of depth three."""
    kind: Literal["tree", "vanilla"] = "tree" if nodes > 1 else "vanilla"
    tokens = tuple(Token(10 + head, "ab"[head % 2], head) for head in heads)
    tested = range(1, min(3, len(heads) - (finish is not None)) + 1) if nodes > 1 else ()
    return Step(tokens, nodes, seconds, kind, 3 if nodes > 1 else 0, finish, tuple(tested))


REPLY = (
    step([0, 1, 2], 0.02),  # heads 1 and 2 right, 3 wrong
    step([0], 0.02),  # head 1 wrong
    step([0], 0.01, nodes=1),  # a probe
    step([0, 1, 2, 3], 0.03),  # all right
    step([0, 1, 0], 0.02, finish="eos"),  # head 1 right, 2 wrong, and a closing token
)


def test_one_step() -> None:
    assert (REPLY[0].text, REPLY[0].settled, REPLY[0].accepted) == ("aba", 3, 2)
    assert (REPLY[1].settled, REPLY[1].accepted) == (1, 0)
    assert (REPLY[4].settled, REPLY[4].accepted) == (2, 1)
    # A vanilla step, and the token that closes the reply.
    only = step([0, 0], 0.01, nodes=1, finish="length")
    assert (only.settled, only.accepted) == (1, 0)
    free = step([0], 0.0, nodes=0, finish="eos")  # the prefill's own token ended it
    assert (free.settled, free.accepted) == (0, 0)


def test_the_figures_of_a_reply() -> None:
    stats = Stats.of(REPLY)
    assert stats.new_tokens == 3 + 1 + 1 + 4 + 3
    assert (stats.steps, stats.tree_steps, stats.vanilla_steps, stats.finish) == (5, 4, 1, "eos")
    # The tree did not bring the closing token.
    assert stats.acceptance_length == (3 + 1 + 4 + 2) / 4
    assert stats.seconds == pytest.approx(0.1)
    assert stats.tokens_per_second == pytest.approx(120)
    assert stats.tree_step_seconds == 0.02
    assert stats.vanilla_tokens_per_second == pytest.approx(100)
    assert stats.overhead == pytest.approx(2.0)
    assert stats.speedup == pytest.approx(1.25)
    # Head 1 was tested in all four tree steps, head 2 where 1 was right, head 3 where both were.
    assert stats.head_acceptance() == {1: 3 / 4, 2: 2 / 3, 3: 1 / 2}


def test_a_vanilla_step_is_compared_with_the_tree_step_before_it() -> None:
    """A machine that gets faster meanwhile does not make the heads look better."""
    slow = [step([0, 1], 0.04), step([0], 0.02, nodes=1)]
    fast = [step([0, 1], 0.01)] * 6
    stats = Stats.of([*slow, *fast])
    assert stats.overhead == pytest.approx(2.0)  # unpaired medians would say 0.5
    assert stats.speedup == pytest.approx(1.0)
    assert stats.vanilla_tokens_per_second == pytest.approx(200)  # at the pace of most tree steps
    ended = Stats.of(
        [step([0, 1], 0.08, finish="eos"), step([0], 0.02, nodes=1), step([0, 1], 0.03)]
    )
    # The tree step before the vanilla one belongs to another reply.
    assert ended.overhead == pytest.approx(2.75)


def noisy(ratio: float, pairs: int) -> Stats:
    """Steps of four tokens, each compared with a vanilla step that took 1 / ratio of its time."""
    return Stats.of([step([0, 1, 2, 3], 0.01 * ratio), step([0], 0.01, nodes=1)] * pairs)


def test_no_speedup_exceeds_the_acceptance_length() -> None:
    held_up = noisy(0.4, 20)  # the vanilla steps, by another program
    assert held_up.overhead == 1
    assert held_up.speedup == held_up.acceptance_length == 4
    assert held_up.vanilla_tokens_per_second == pytest.approx(1 / 0.004)


def test_a_speedup_is_shown_from_enough_comparisons_on() -> None:
    few, some, many = (noisy(2.0, pairs) for pairs in (3, 4, 8))
    assert few.shown_speedup(few) is None
    assert few.shown_speedup(many) == Speedup(2.0, 8, of_reply=False)
    assert some.shown_speedup(some) == Speedup(2.0, 4, of_reply=False)
    assert many.shown_speedup(noisy(3.0, 40)) == Speedup(2.0, 8, of_reply=True)
    short = Stats.of([step([0, 1], 0.02)])
    assert short.shown_speedup(many) == Speedup(1.0, 8, of_reply=False)  # two tokens, at their cost
    for name in ("speedup", "overhead", "vanilla_tokens_per_second"):
        assert few.as_json()[name] is None
        assert some.as_json()[name]
    assert few.as_json()["comparisons"] == 3
    vanilla = Stats.of([step([0], 0.01, nodes=1)])
    assert vanilla.as_json()["vanilla_tokens_per_second"] == 100


def test_copied_guesses_count_by_themselves_at_every_depth() -> None:
    tokens = tuple(Token(7, "a", head) for head in (0, 1, COPIED, COPIED))
    steps = [
        Step(tokens, 8, 0.02, "tree", tested=(COPIED, COPIED, COPIED, 1, 2)),
        step([0, 1], 0.02),
    ]
    stats = Stats.of(steps)
    assert stats.head_acceptance() == {COPIED: 2 / 3, 1: 1.0, 2: 0.0}
    assert stats.acceptance_length == 3
    assert stats.as_json()["head_acceptance"] == {"-1": 0.66667, "1": 1.0, "2": 0.0}


def test_steps_of_paused_heads_do_not_enter_the_comparison() -> None:
    pause = Pause(0.9, 60, 128)
    paused = [replace(step([0], seconds, nodes=1), paused=pause) for seconds in (0.001, 0.5, 0.002)]
    stats = Stats.of([*REPLY[:4], *paused])
    assert (stats.paused, stats.paused_steps, stats.vanilla_steps, stats.steps) == (pause, 3, 4, 7)
    with_heads = Stats.of(REPLY[:4])
    for name in (
        "speedup",
        "overhead",
        "acceptance_length",
        "vanilla_tokens_per_second",
        "reached",
        "accepted",
    ):
        assert getattr(stats, name) == getattr(with_heads, name)
    assert stats.new_tokens == with_heads.new_tokens + 3
    assert stats.tokens_per_second == pytest.approx(stats.new_tokens / (0.08 + 0.503))
    stats.add(REPLY[4])
    assert (stats.paused, stats.paused_steps) == (None, 3)
    only = Stats.of(paused)
    assert only.speedup is only.overhead is only.acceptance_length is None
    line = json.loads(json.dumps(paused[0].as_json()))
    assert line["paused"] == {"speedup": 0.9, "steps": 60, "retry_in": 128}
    assert json.loads(json.dumps(only.as_json()))["paused"] == line["paused"]
    assert str(pause) == "heads are slower here (0.90x): off for 128 tokens"


def test_a_window_holds_the_last_steps_alone() -> None:
    stats = Stats(window=4)
    for seconds in (9.0, 9.0, 0.04, 0.02):
        stats.add(step([0, 1, 2, 3], seconds))
        stats.add(step([0], 0.01, nodes=1))
    for _ in range(3):
        stats.add(step([0, 1], 0.03))
    assert stats.tree_steps == 4
    assert stats.acceptance_length == (4 + 2 + 2 + 2) / 4
    assert stats.overhead == pytest.approx(4.0)  # of the faster of the last two vanilla steps
    assert stats.speedup == pytest.approx(2.5 / 4)
    assert stats.new_tokens == 26


def test_two_thirds_of_the_comparisons_are_at_most_the_overhead() -> None:
    stats = Stats()
    for ratio in (7, 2, 5, 3, 1, 6, 4):
        stats.add(step([0, 1], 0.01 * ratio))
        stats.add(step([0], 0.01, nodes=1))
    assert stats.overhead == pytest.approx(5.0)


def test_nothing_is_known_before_it_was_measured() -> None:
    for stats in (Stats(), Stats.of([step([0], 0.0, nodes=0, finish="eos")])):
        assert (
            stats.acceptance_length
            is stats.overhead
            is stats.speedup
            is stats.tokens_per_second
            is None
        )
        assert stats.head_acceptance() == {}
        json.dumps(stats.as_json())
    trees_alone = Stats.of(REPLY[:2])
    assert trees_alone.acceptance_length == 2.0
    assert (
        trees_alone.overhead is trees_alone.speedup is trees_alone.vanilla_tokens_per_second is None
    )
    vanilla_alone = Stats.of(REPLY[2:3])
    assert vanilla_alone.acceptance_length is vanilla_alone.overhead is None
    assert vanilla_alone.vanilla_tokens_per_second == pytest.approx(100)


def test_one_slow_step_does_not_change_the_measured_overhead() -> None:
    steps = [step([0, 1], 0.02)] * 5 + [step([0], 0.01, nodes=1)] * 5 + [step([0, 1], 9.0)]
    assert Stats.of(steps).overhead == pytest.approx(2.0)


def test_stats_of_a_conversation_add_up() -> None:
    both = Stats.of([*REPLY, *REPLY])
    assert both.new_tokens == 24
    assert both.acceptance_length == Stats.of(REPLY).acceptance_length
    assert both.head_acceptance() == Stats.of(REPLY).head_acceptance()


def test_json_lines() -> None:
    line = json.loads(json.dumps(step([0, 1, COPIED], 0.5, finish="stop").as_json()))
    assert line["type"] == "step"
    assert line["tokens"][1] == {"id": 11, "text": "b", "head": 1}
    assert (line["nodes"], line["seconds"], line["kind"], line["finish"]) == (
        8,
        0.5,
        "tree",
        "stop",
    )
    summary = json.loads(json.dumps(Stats.of(REPLY).as_json()))
    assert summary["acceptance_length"] == 2.5
    assert summary["head_acceptance"] == {"1": 0.75, "2": 0.66667, "3": 0.5}
    assert {
        "new_tokens",
        "steps",
        "tokens_per_second",
        "vanilla_tokens_per_second",
        "speedup",
        "overhead",
        "finish",
    } <= set(summary)
