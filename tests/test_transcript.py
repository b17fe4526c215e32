"""The transcript of a chat: written after each change, tried again, not lost to another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from medusa_chat.config import UserError
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.chat.conversation import read_conversation
from medusa_chat.terminal.chat.prompt import open_history
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.chat.transcript import Transcript
from tests.helpers.fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Talk:
    """A session with a transcript, whose user answers questions by `yes`."""

    def __init__(self, file: Path) -> None:
        self.session = Session(FakeEngine(), Sampling())
        self.transcript = Transcript(file)
        self.transcript.__enter__()
        self.transcript.follow(self.session)
        self.yes = False
        self.questions: list[str] = []

    def keep(self) -> str:
        return self.transcript.keep(self.session, self._answer)

    def _answer(self, question: str) -> bool:
        self.questions.append(question)
        return self.yes

    def say(self, text: str) -> str:
        list(self.session.ask(text))
        return self.keep()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    made = Talk(tmp_path / "talk.json")
    yield made
    made.transcript.__exit__()


def asked(file: Path) -> list[str]:
    return [m["content"] for m in read_conversation(file).messages if m["role"] == "user"]


def test_it_follows_what_is_taken_back(talk: Talk, tmp_path: Path) -> None:
    for text in ("one", "two"):
        assert talk.say(text) == ""
    talk.session.undo()
    assert talk.keep() == ""
    assert asked(tmp_path / "talk.json") == ["one"]
    talk.session.undo()
    talk.keep()
    assert asked(tmp_path / "talk.json") == []
    assert not talk.questions


def test_a_failed_write_is_told_once_and_tried_again(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.mkdir()
    line = talk.say("one")
    assert line.startswith(f"{file} is not a saved conversation")
    assert talk.say("two") == ""
    file.rmdir()
    assert talk.say("three") == f"the transcript is written again: {file}"
    assert asked(file) == ["one", "two", "three"]


@pytest.mark.parametrize("yes", [True, False])
def test_another_conversation_replaces_it_only_if_the_user_says_so(
    talk: Talk, tmp_path: Path, yes: bool
) -> None:
    file = tmp_path / "talk.json"
    (tmp_path / "talk-2.json").write_text("of something else")
    talk.yes = yes
    talk.say("one")
    talk.session.reset()
    assert talk.keep() == ""  # nothing to write yet
    line = talk.say("two")
    assert talk.questions == [f"{file} holds the conversation before this one; replace it? (y/n) "]
    other = tmp_path / "talk-3.json"
    assert line == ("" if yes else f"{file} is kept as it is; this conversation goes to {other}")
    talk.say("three")
    assert asked(file) == (["two", "three"] if yes else ["one"])
    assert yes or asked(other) == ["two", "three"]
    assert len(talk.questions) == 1
    assert (tmp_path / "talk-2.json").read_text() == "of something else"


@pytest.mark.usefixtures("talk")
def test_two_chats_with_one_transcript(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another chat is writing to .*talk.json"):
        Talk(tmp_path / "talk.json")


def test_a_history_whose_folder_is_gone_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    history, notice = open_history(folder / "history", lambda: False)
    assert notice == ""
    history.append_string("one")
    (folder / "history").unlink()
    folder.rmdir()
    history.append_string("two")
    assert "+two" in (folder / "history").read_text()
    (folder / "history").unlink()
    folder.rmdir()
    folder.write_text("a file now")
    history.append_string("three")
    assert list(history.get_strings()) == ["one", "two", "three"]
