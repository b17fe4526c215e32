"""The conversation: its turns however a reply ends, saving and loading."""

from __future__ import annotations

import json
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from medusa_chat.config import Message, UserError
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.terminal.chat.conversation import read_conversation
from medusa_chat.terminal.chat.session import Session
from tests.helpers.fake_engine import REPLY, FakeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from medusa_chat.events import Step


def talk(session: Session, *texts: str) -> None:
    for text in texts:
        assert list(session.ask(text))


def test_a_reply_is_streamed_kept_and_measured() -> None:
    session = Session(FakeEngine(), Sampling())
    steps = list(session.ask("hello"))
    assert session.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": REPLY},
    ]
    assert session.last == session.conversation == Stats.of(steps)
    talk(session, "more")
    assert session.last == Stats.of(steps)
    assert session.conversation.new_tokens == 2 * session.last.new_tokens


def test_the_prompt_holds_system_and_all_turns() -> None:
    engine = FakeEngine()
    session = Session(engine, Sampling())
    talk(session, "one", "two")
    roles = [message["role"] for message in engine.prompts[-1]]
    assert roles == ["system", "user", "assistant", "user"]
    assert engine.prompts[-1][0]["content"] == engine.system
    assert Session(engine, Sampling(), system="").system == ""
    session.system = ""
    talk(session, "three")
    assert engine.prompts[-1][0] == {"role": "system", "content": ""}  # replaces the model's own


class Remembering(FakeEngine):
    """Keeps a reference to its generator, which therefore ends only if it is closed."""

    def generate(self, prompt: list[int] | list[Message], sampling: Sampling) -> Iterator[Step]:
        self.stream = super().generate(prompt, sampling)
        return self.stream


def test_closing_early_keeps_the_text_and_closes_the_engine() -> None:
    engine = Remembering()
    session = Session(engine, Sampling())
    with closing(session.ask("hello")) as steps:
        text = next(steps).text + next(steps).text
    assert session.messages[-1] == {"role": "assistant", "content": text}
    assert engine.closed == 1


def test_an_error_inside_the_engine_keeps_the_text() -> None:
    session = Session(FakeEngine(fails_after=2), Sampling())
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.ask("hello"))
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert REPLY.startswith(session.messages[1]["content"])


@pytest.mark.parametrize("reply", [KeyboardInterrupt(), UserError("too long"), " \n"])
def test_a_turn_without_an_answer_is_dropped(reply: str | BaseException) -> None:
    session = Session(FakeEngine([REPLY, reply]), Sampling())
    talk(session, "hello")
    before = list(session.messages)
    with suppress(KeyboardInterrupt, UserError):
        list(session.ask("again"))
    assert session.messages == before


def test_a_reply_that_is_never_started_changes_nothing() -> None:
    session = Session(FakeEngine(), Sampling())
    session.ask("hello").close()
    assert session.messages == []


def test_undo() -> None:
    session = Session(FakeEngine(), Sampling())
    talk(session, "one", "two")
    assert session.undo() == "two"
    assert [message["content"] for message in session.messages] == ["one", REPLY]
    assert session.undo() == "one"
    with pytest.raises(UserError, match="nothing to take back"):
        session.undo()


def test_regen_answers_the_same_turn_with_another_seed() -> None:
    engine = FakeEngine(["first", "second"])
    session = Session(engine, Sampling(mode="typical", seed=2**32 - 1))
    talk(session, "hello")
    list(session.regen())
    assert [message["content"] for message in session.messages] == ["hello", "second"]
    assert engine.prompts[0] == engine.prompts[1]
    assert [sampling.seed for sampling in engine.samplings] == [2**32 - 1, 0]


def test_regen_in_greedy_mode_leaves_the_seed_alone() -> None:
    session = Session(FakeEngine(), Sampling())
    with pytest.raises(UserError, match="no reply"):
        session.regen()
    talk(session, "hello")
    list(session.regen())
    assert session.sampling.seed == 0


def test_a_regen_without_text_keeps_the_old_reply() -> None:
    session = Session(FakeEngine(["first", KeyboardInterrupt()]), Sampling())
    talk(session, "hello")
    with pytest.raises(KeyboardInterrupt):
        list(session.regen())
    assert session.messages[-1]["content"] == "first"


def test_a_reply_that_was_cut_goes_on() -> None:
    engine = FakeEngine(["one two three", " four five"], finish="length")
    session = Session(engine, Sampling())
    with pytest.raises(UserError, match="no reply to continue"):
        session.go_on()
    talk(session, "hello")
    list(session.go_on())
    assert session.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "one two three four five"},
    ]
    first = engine.encode(engine.prompts[0])
    assert engine.ids[1] == [*first, 7, 7, 7]  # the same prompt, and the tokens of the reply
    assert [answer.text for answer in session.answers] == ["one two three four five"]


def test_an_interrupted_reply_goes_on() -> None:
    session = Session(FakeEngine(["one two three four five six"]), Sampling())
    with closing(session.ask("hello")) as steps:
        next(steps)
    begun = session.messages[-1]["content"]
    list(session.go_on())
    assert session.messages[-1]["content"] == begun + "one two three four five six"
    with pytest.raises(UserError, match="complete"):
        session.go_on()


def test_a_message_is_replaced_once_the_new_one_has_an_answer() -> None:
    session = Session(FakeEngine(["first", KeyboardInterrupt(), "second"]), Sampling())
    with pytest.raises(UserError, match="no message to replace"):
        session.ask("x", replacing=True)
    talk(session, "helo")
    before = list(session.messages)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("hello", replacing=True))
    assert session.messages == before
    list(session.ask("hello", replacing=True))
    assert [message["content"] for message in session.messages] == ["hello", "second"]


def test_the_reply_that_was_chosen_is_the_one_that_goes_on() -> None:
    engine = FakeEngine(["first", "second", "third"], finish="length")
    session = Session(engine, Sampling())
    talk(session, "hello")
    list(session.regen())
    session.choose(1)
    list(session.go_on())
    assert [answer.text for answer in session.answers] == ["second", "firstthird"]
    talk(session, "more")
    assert len(session.answers) == 1


def test_reset_keeps_settings() -> None:
    session = Session(FakeEngine(), Sampling(mode="exact"), system="Be brief.")
    talk(session, "hello")
    session.reset()
    assert (session.messages, session.last, session.conversation) == ([], Stats(), Stats())
    assert (session.sampling.mode, session.system) == ("exact", "Be brief.")


def test_save_and_load(tmp_path: Path) -> None:
    session = Session(
        FakeEngine(["Grüße 你好 🦊\n\x1b[31m"]),
        Sampling(mode="typical", stop=("\n\n",)),
        system="S",
    )
    talk(session, "one")
    path = tmp_path / "talk.json"
    session.save(path)
    session.save(path)  # over a saved conversation
    other = Session(FakeEngine(), Sampling())
    other.load(read_conversation(path))
    assert (other.messages, other.sampling, other.system) == (
        session.messages,
        session.sampling,
        "S",
    )
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    Session(FakeEngine(), Sampling(seed=4)).save(path)
    document = json.loads(path.read_text())
    document["sampling"] |= {"sample": False}
    del document["sampling"]["loop_guard"]
    path.write_text(json.dumps(document))
    assert read_conversation(path).sampling == Sampling(seed=4)


def test_save_overwrites_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    expected = r"thesis\.txt is not a saved conversation; choose another name"
    with pytest.raises(UserError, match=expected):
        Session(FakeEngine(), Sampling()).save(path)
    assert path.read_text() == "years of work"
    with pytest.raises(UserError, match=r"^cannot write .*x: File name too long$"):
        Session(FakeEngine(), Sampling()).save(tmp_path / ("x" * 300))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(FakeEngine(), Sampling())
    path = tmp_path / "talk.json"
    session.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    talk(session, "hello")
    with pytest.raises(UserError, match=r"talk\.json: No space left"):
        session.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        Session(FakeEngine(), Sampling()).save(tmp_path / "absent" / "talk.json")
    with pytest.raises(UserError, match=r"nothing\.json: No such file"):
        read_conversation(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="cannot read"):
        read_conversation(tmp_path)


GOOD = {"model": "m", "system": "", "sampling": {}, "messages": []}


@pytest.mark.parametrize(
    "document",
    [
        "[",
        "[]",
        "\x00",
        json.dumps({**GOOD, "extra": 1}),
        json.dumps({**GOOD, "system": None}),
        json.dumps({**GOOD, "messages": [{"role": "user"}]}),
        json.dumps({**GOOD, "messages": [{"role": "wizard", "content": "x"}]}),
        json.dumps({**GOOD, "messages": [{"role": "user", "content": 3}]}),
        json.dumps({**GOOD, "sampling": {"temperature": "hot"}}),
        json.dumps({**GOOD, "sampling": {"temperature": -1}}),
        json.dumps({**GOOD, "sampling": {"seed": True}}),
        json.dumps({**GOOD, "sampling": {"stop": "x"}}),
        json.dumps({**GOOD, "sampling": {"heat": 1}}),
        json.dumps({**GOOD, "sampling": []}),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, document: str) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(document)
    with pytest.raises(UserError, match=r"damaged\.json is not a saved conversation: ") as caught:
        read_conversation(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"damaged\.json is not a saved conversation: "):
        read_conversation(path)


def test_the_good_file_of_these_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.json"
    path.write_text(json.dumps(GOOD | {"sampling": {"temperature": 1}}))
    assert read_conversation(path).sampling == Sampling(temperature=1)
