"""`distill --prompts self:N`: the model invents the user turns, and answers them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.config import UserError
from medusa_chat.training import invention
from medusa_chat.training.conversations import Conversation
from medusa_chat.training.distillation import distill
from medusa_chat.training.invention import Inventor, is_language, wanted_of
from medusa_chat.training.questions import DistillJob
from tests.helpers.complaints import refusal
from tests.helpers.tiny import END, random_model, save_model, tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from medusa_chat.training.questions import Question


@pytest.mark.parametrize(
    ("text", "natural"),
    [
        ("Can you tell me who won the Hugo Award?", True),
        ("Wie viele Brücken hat Venedig?", True),
        ("请告诉我巴黎的历史和文化", True),
        ("Solve 3 + 4 for me", False),  # three of six words have no letter
        ("Hi", False),
        ("word " * 200, False),
        ("Tell me про это, 请 and этого", False),
        ("1 2 3 4 5 6 abcdefg", False),
    ],
)
def test_what_counts_as_language(text: str, natural: bool) -> None:
    assert is_language(text) == natural


@dataclass
class Scripted:
    """Invents what it is given, one list for each call."""

    said: list[list[str | None]]
    asked: list[tuple[list[int], int]] = field(default_factory=list)

    def invent(self, questions: Sequence[Question], attempt: int) -> list[str | None]:
        self.asked.append(([question.index for question in questions], attempt))
        return self.said.pop(0)


def test_turns_that_are_unusable_are_tried_again_and_later_ones_end_the_conversation() -> None:
    moon, sun, sea = "Where is the moon?", "Where is the sun?", "Where is the sea?"
    said: list[list[str | None]] = [
        [moon, "where is the MOON", None],  # repeated, and without an end
        [sun, "?"],  # no language
        [sea],
        [moon, sun, "Why is that?"],  # the first repeats itself, the second another conversation
    ]
    model = Scripted(said)
    inventor = Inventor(model)
    talks = [Conversation.empty(index, "") for index in range(3)]
    inventor.add_turns(talks, 0)
    assert [talk.turns for talk in talks] == [(moon,), (sun,), (sea,)]
    assert model.asked == [([0, 1, 2], 0), ([1, 2], 1), ([2], 2)]
    talks[1].turns = ("Where is the sea bed?",)
    inventor.add_turns(talks, 1)
    assert [talk.ended for talk in talks] == [True, False, False]
    assert talks[2].turns == (sea, "Why is that?")
    again = Inventor(Scripted([[moon]] * invention.TRIES))
    again.remember(talks)
    last = Conversation.empty(3, "")
    again.add_turns([last], 0)
    assert last.ended
    assert last.turns == ()


def run(model: Path, out: Path, prompts: str = "self:5", **changes: Any) -> list[dict[str, Any]]:
    from pathlib import Path

    job: dict[str, Any] = {"turns": 2, "batch": 2, "max_new_tokens": 6, "temperature": 0.7}
    server = changes.pop("server", None)
    job |= {"seed": 3} | changes
    distill(
        str(model), [Path(prompts)], out, DistillJob(**job), server=server, progress=lambda *_: None
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes one of many ends every few tokens."""
    model = random_model("llama", 260)
    model.generation_config.eos_token_id = [*range(3, 250, 12), END]
    return save_model(tmp_path_factory.mktemp("m"), model)


def test_a_run_is_seeded_and_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invention, "is_language", lambda _: True)
    monkeypatch.setattr(invention, "_plain", lambda text: text)
    whole = tmp_path / "whole.jsonl"
    lines = run(folder, whole)
    assert lines
    users = [each["content"] for line in lines for each in line["messages"][::2]]
    assert len({line["messages"][0]["content"] for line in lines}) == len(lines)
    assert all(line["settings"]["prompts"] == "self" for line in lines)
    assert all(users)
    content = whole.read_bytes()
    for place in (0, len(content) // 3, len(content) - 9):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(content[:place])
        run(folder, cut)
        assert cut.read_bytes() == content
    assert run(folder, tmp_path / "other.jsonl", seed=4) != lines


def test_the_model_is_asked_up_to_where_the_user_speaks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medusa_chat.training.local_model import LocalModel

    rows: list[list[int]] = []

    def generate(_self: Any, asked: list[list[int]], *_: Any) -> list[Any]:
        rows.extend(asked)
        raise UserError("enough")

    monkeypatch.setattr(LocalModel, "_generate", generate)
    with pytest.raises(UserError, match="enough"):
        run(folder, tmp_path / "o.jsonl", system="S")
    assert rows[0] == tokenizer().encode("<|system|>S<|end|><|user|>")


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    from pathlib import Path

    out = tmp_path / "o.jsonl"
    assert "leave --server out" in refusal(run, folder, out, server="http://127.0.0.1:9")
    assert "invented nothing that a user would write in 2" in refusal(run, folder, out, "self:2")
    assert wanted_of([Path("a.jsonl"), Path("b")]) == 0
    assert "cannot be mixed" in refusal(wanted_of, [Path("self:3"), Path("b")])
    assert "at least 1" in refusal(wanted_of, [Path("self:0")])
