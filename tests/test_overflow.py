"""A conversation that outgrows the context goes on without its oldest turns."""

from __future__ import annotations

from itertools import cycle, pairwise
from typing import Literal

import pytest

from medusa_chat.config import UserError
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.chat.session import Session
from tests.helpers.fake_engine import FakeEngine

SYSTEM = "You help."
TEN = " ".join(["word"] * 10)


def session(
    context: int, reply: str = TEN, overflow: Literal["drop", "stop"] = "drop"
) -> tuple[Session, FakeEngine]:
    engine = FakeEngine([reply])
    engine.context = context
    return Session(engine, Sampling(overflow=overflow), SYSTEM), engine


def read(engine: FakeEngine) -> list[str]:
    return [message["content"] for message in engine.prompts[-1]]


def test_whole_oldest_turns_are_left_out_and_the_system_prompt_stays() -> None:
    talk, engine = session(64)
    for number in range(5):
        list(talk.ask(f"question {number} " + TEN))
    assert read(engine)[0] == SYSTEM
    first = read(engine)[1]
    assert first.startswith("question ")
    assert not first.startswith("question 0")
    roles = [message["role"] for message in engine.prompts[-1][1:]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert len(talk.messages) == 10  # nothing that was said is lost
    assert talk.messages[-1]["content"] == TEN
    assert len([line for line in engine.notices if "oldest turns" in line]) == 1


def test_the_same_turns_stay_out_until_the_context_is_full_again() -> None:
    talk, engine = session(200)
    firsts = []
    for number in range(30):
        list(talk.ask(f"question {number} " + TEN))
        firsts.append(read(engine)[1])
    changes = sum(one != other for one, other in pairwise(firsts))
    assert 5 <= changes <= 10  # the cache is not read anew at each message


def test_a_reply_that_fills_the_context_goes_on() -> None:
    reply = " ".join(f"w{number}" for number in range(30))
    talk, engine = session(64, TEN)
    list(talk.ask("one " + TEN))
    engine.replies = cycle([reply, " and on."])
    steps = list(talk.ask("two " + TEN))
    kept = engine.encode([*engine.prompts[1][:1], *engine.prompts[1][-1:]])
    assert engine.ids[-1][: len(kept)] == kept  # without the first turn
    assert set(engine.ids[-1][len(kept) :]) == {7}  # the reply's own tokens are read again
    assert [step.finish for step in steps if step.finish] == ["eos"]
    said = talk.messages[-1]["content"]
    assert said.startswith("w0 w1 w2")
    assert said.endswith(" and on.")


def test_a_single_turn_can_fill_the_context() -> None:
    talk, _ = session(20, TEN + " " + TEN)
    steps = list(talk.ask("one two three"))
    assert steps[-1].finish == "context"
    with pytest.raises(UserError, match="the prompt has"):
        list(talk.ask(TEN + TEN + TEN))


def test_stop_leaves_out_nothing() -> None:
    talk, engine = session(64, overflow="stop")
    for number in range(2):
        list(talk.ask(f"question {number} " + TEN))
    with pytest.raises(UserError, match="the prompt has"):
        list(talk.ask("question 2 " + TEN + " " + TEN))
    assert len(talk.messages) == 4
    assert engine.notices == []


def test_a_turn_taken_back_brings_older_ones_in_again() -> None:
    talk, engine = session(64)
    for number in range(4):
        list(talk.ask(f"question {number} " + TEN))
    assert not read(engine)[1].startswith("question 0")
    for _ in range(3):
        talk.undo()
    list(talk.ask("short"))
    assert read(engine)[1].startswith("question 0")
    talk.reset()
    for number in range(4):
        list(talk.ask(f"question {number} " + TEN))
    assert len(engine.notices) == 2  # once in each conversation
