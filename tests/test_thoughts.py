"""Thoughts of a model: told from the answer, folded, kept out of later turns."""

from __future__ import annotations

from itertools import product

import pytest

from medusa_chat.config import UserError
from medusa_chat.events import Token
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.chat.command import Chat
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.thoughts import Thoughts, answer_of, split
from tests.helpers.fake_engine import FakeEngine


def sorted_out(pieces: list[str], begun: str = "") -> tuple[str, str]:
    thoughts = Thoughts(begun)
    pairs = [pair for piece in pieces for pair in thoughts.feed(Token(7, piece, 0))]
    pairs += thoughts.rest()
    found = {True: "", False: ""}
    for token, thought in pairs:
        found[thought] += token.text
    assert found[True] == thoughts.text
    return found[True], found[False]


@pytest.mark.parametrize(
    ("pieces", "begun", "expected"),
    [
        (["<think>", "a", " b", "</think>", "\n\nans"], "", ("a b", "\n\nans")),
        (["a", "b</think>", "c <think>d"], "<think>", ("ab", "c <think>d")),  # a lone end
        (["more</think>a"], "<think>x", ("more", "a")),  # /continue inside the thoughts
        ([" a </think>"], "<think>x</think>b", ("", " a </think>")),
        (["write <think> x</think>"], "", ("", "write <think> x</think>")),
        (["<", "b", ">"], "", ("", "<b>")),
        (["<think>", "never", " ends"], "", ("never ends", "")),
        (["<thin"], "", ("", "<thin")),
        (["<think>", "a</th"], "", ("a</th", "")),
    ],
)
def test_thoughts_and_answer(pieces: list[str], begun: str, expected: tuple[str, str]) -> None:
    assert sorted_out(pieces, begun) == expected


def test_tags_may_be_cut_anywhere() -> None:
    text = "<think>ab</think>c"
    for cuts in product((False, True), repeat=8):
        places = [place for place, cut in zip(range(1, 18, 2), cuts, strict=False) if cut]
        edges = [0, *places, len(text)]
        pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]  # noqa: RUF007
        assert sorted_out(pieces) == ("ab", "c")


def test_whole_replies_are_split() -> None:
    assert split("<think>\nHm.\n</think>\n\nYes.") == ("Hm.", "Yes.")
    assert split("Yes, <think> is a tag.") == ("", "Yes, <think> is a tag.")
    assert answer_of("<think>cut") == "<think>cut"


def test_earlier_thoughts_are_left_out_unless_the_template_does_it() -> None:
    engine = FakeEngine(["<think>Hm.</think>Yes."])
    session = Session(engine, Sampling())
    list(session.ask("<think> is what?"))
    list(session.ask("And now?"))
    read = [message["content"] for message in engine.prompts[-1]]
    assert read[1:] == ["<think> is what?", "Yes.", "And now?"]
    assert session.messages[1]["content"] == "<think>Hm.</think>Yes."
    assert session.last_reply() == "Yes."
    engine.template.drops_thoughts = True
    list(session.ask("Again?"))
    assert engine.prompts[-1][2]["content"] == "<think>Hm.</think>Yes."


def test_a_block_that_the_template_opens() -> None:
    engine = FakeEngine(["Hm.</think>Yes."])
    engine.template.opens = "<think>"
    session = Session(engine, Sampling())
    list(session.ask("Well?"))
    assert session.messages[-1]["content"] == "<think>Hm.</think>Yes."
    assert session.last_reply() == "Yes."
    with pytest.raises(UserError, match="no switch for thinking"):
        dispatch(Chat(session), "/think on")


def test_thinking_is_switched() -> None:
    engine = FakeEngine()
    chat = Chat(Session(engine, Sampling()))
    assert str(dispatch(chat, "/think")) == "thinking: as the model's template has it"
    assert str(dispatch(chat, "/think off")) == "thinking: off"
    assert engine.template.thinking is False
    assert str(dispatch(chat, "/think on")) == "thinking: on"
    with pytest.raises(UserError, match="usage: /think"):
        dispatch(chat, "/think maybe")
    with pytest.raises(UserError, match="usage: /thoughts"):
        dispatch(chat, "/thoughts maybe")
