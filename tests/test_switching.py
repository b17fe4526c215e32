"""`/model`: the conversation goes on with another model, or with the present one after a fault."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from medusa_chat.commands.open_chat import OtherModels
from medusa_chat.config import LoadOptions, MemoryShortageError, UserError
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.terminal.chat.command import Chat, Switch
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.errors import LoadError
from medusa_chat.terminal.chat.keeping import Keeper
from medusa_chat.terminal.chat.kept import Place
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.chat.switching import switch
from tests.helpers.fake_engine import REPLY, FakeEngine
from tests.helpers.tiny import save_with_heads
from tests.test_commands import completions

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.terminal.chat.engine import ChatEngine
    from medusa_chat.terminal.chat.loading import Loading


def shortage(missing: int) -> MemoryShortageError:
    return MemoryShortageError("other needs 9.0 GB", missing)


class FakeModels:
    """Implements Models. `outcomes` come in turn; None is a model, an exception is raised."""

    def __init__(self, *outcomes: BaseException | None) -> None:
        self.outcomes = list(outcomes)
        self.asked: list[str | None] = []
        self.defaults: dict[str, Any] = {}

    def names(self) -> list[str]:
        return ["bundled", "other", "vicuna-7b"]

    def load(self, place: Place, _progress: object) -> FakeEngine:
        self.asked.append(place.model)
        if outcome := self.outcomes.pop(0):
            raise outcome
        engine = FakeEngine(["reply of the other"], heads=2)
        engine.name = str(place.model)
        engine.system = "You are the other."
        engine.defaults = self.defaults
        return engine

    def size(self, place: Place) -> int:
        return 1000 if place == Place("present") else 0


@pytest.fixture
def chat() -> Chat:
    engine = FakeEngine()
    engine.name = "present"
    chat = Chat(Session(engine, Sampling()), keeper=Keeper(place=Place("present")))
    list(chat.session.ask("one"))
    return chat


def change(chat: Chat, models: FakeModels) -> str:
    result = dispatch(chat, "/model other")
    assert isinstance(result, Switch)
    out = io.StringIO()
    shown = switch(chat, models, result.name, lambda loading: loading.result())
    Console(file=out, width=100, color_system=None).print(shown)
    return out.getvalue()


def test_the_conversation_goes_along(chat: Chat) -> None:
    present = chat.session.engine
    shown = change(chat, FakeModels(None))
    assert shown.startswith("you now chat with other; it reads the 2 messages of the conversation")
    assert "2 ahead" in shown
    assert "3 ahead" not in shown
    assert chat.session.conversation == Stats()
    assert chat.keeper.place == Place("other")
    list(chat.session.ask("two"))
    engine = chat.session.engine
    assert isinstance(engine, FakeEngine)
    texts = [message["content"] for message in engine.prompts[0]]
    assert texts == ["You are the other.", "one", REPLY, "two"]
    assert isinstance(present, FakeEngine)
    assert not present.freed  # both fitted
    assert chat.session.record().model == "other"


def test_defaults_of_the_other_model_hold_where_nothing_was_set(chat: Chat) -> None:
    session = chat.session
    session.engine.defaults = {"mode": "exact", "temperature": 0.6, "top_k": 20}
    session.sampling = Sampling(mode="exact", temperature=0.6, top_k=5)
    models = FakeModels(None)
    models.defaults = {"temperature": 0.2, "repetition_penalty": 1.1}
    shown = change(chat, models)
    assert session.sampling == Sampling(temperature=0.2, top_k=5, repetition_penalty=1.1)
    assert "defaults of the model: temperature 0.2, repetition-penalty 1.1" in shown
    assert "defaults of the model" not in change(chat, FakeModels(None))
    assert session.sampling == Sampling(top_k=5)


def test_a_reply_of_the_other_model_is_not_continued(chat: Chat) -> None:
    chat.session.engine = FakeEngine(finish="length")
    list(chat.session.ask("one"))
    list(chat.session.regen())
    change(chat, FakeModels(None))
    with pytest.raises(UserError, match="nothing to continue"):
        chat.session.go_on()  # its ids are those of another tokenizer
    chat.session.choose(1)
    assert len(chat.session.answers) == 2


@pytest.mark.parametrize(
    "fault",
    [UserError("unknown model 'other'"), ValueError("damaged"), shortage(1001)],
)
def test_a_model_that_cannot_be_loaded_leaves_the_present_one(chat: Chat, fault: Exception) -> None:
    present = chat.session.engine
    models = FakeModels(fault)
    with pytest.raises(UserError, match="; still using present") as caught:
        change(chat, models)
    assert str(fault) in str(caught.value)
    assert chat.session.engine is present
    assert isinstance(present, FakeEngine)
    assert not present.freed
    assert models.asked == ["other"]
    assert chat.keeper.place == Place("present")


def test_ctrl_c_leaves_the_present_one(chat: Chat) -> None:
    def interrupted(_: Loading) -> ChatEngine:
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="still using present"):
        switch(chat, FakeModels(None), "other", interrupted)


@pytest.mark.parametrize("fault", [shortage(1000), MemoryError()])
def test_the_present_model_is_freed_where_both_do_not_fit(chat: Chat, fault: Exception) -> None:
    present = chat.session.engine
    models = FakeModels(fault, None)
    assert "you now chat with other" in change(chat, models)
    assert isinstance(present, FakeEngine)
    assert present.freed
    assert models.asked == ["other", "other"]


def test_a_freed_model_comes_back_if_the_other_one_fails(chat: Chat) -> None:
    models = FakeModels(shortage(500), shortage(10), None)
    with pytest.raises(UserError, match=r"other needs 9\.0 GB; still using present"):
        change(chat, models)
    assert models.asked == ["other", "other", "present"]
    assert list(chat.session.ask("two"))
    with pytest.raises(LoadError):  # there is no model left to chat with
        change(chat, FakeModels(shortage(500), shortage(10), ValueError("gone")))


def test_model_alone_names_the_models(chat: Chat) -> None:
    chat.session.names["model"] = FakeModels().names
    out = io.StringIO()
    Console(file=out, width=100).print(dispatch(chat, "/model"))
    assert out.getvalue().strip() == (
        "model: present; /model NAME changes it: bundled, other, vicuna-7b"
    )
    assert completions("/model vic", chat.session) == ["/model vicuna-7b"]
    assert completions("/model vic", None) == []
    with pytest.raises(UserError, match="no other models"):
        switch(chat, None, "other", lambda loading: loading.result())


def test_real_models_take_each_others_place(tmp_path: Path) -> None:
    folder = save_with_heads(tmp_path / "tiny")
    models = OtherModels(LoadOptions(tree="chain-2", dtype="float32"))
    chat = Chat(Session(models.load(Place(), print), Sampling(max_new_tokens=8)))
    list(chat.session.ask("Tell me a story."))
    first = chat.session.engine
    switch(chat, models, str(folder), lambda loading: loading.result())
    assert list(chat.session.ask("Go on."))
    assert len(chat.session.messages) in (2, 4)  # random weights may say nothing
    assert chat.keeper.place == Place(str(folder))
    first.close()
    assert 10_000 < models.size(Place(str(folder))) < models.size(Place())
    assert "bundled" in models.names()
    assert Place(".", "vicuna-7b").whole() == Place(str(tmp_path.cwd()), "vicuna-7b")
