"""Files of text are told by their content: what was meant is read, or one line names the place."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from medusa_chat.bench.replies import Turn, converse
from medusa_chat.config import UserError
from medusa_chat.decoding.trees.accuracy import read_accuracy
from medusa_chat.decoding.trees.tree import named_tree
from medusa_chat.export.folder import check_folder
from medusa_chat.files import read_json
from medusa_chat.hub.model_list import read_models
from medusa_chat.locks import only_writer
from medusa_chat.model.layouts.config import read_config
from medusa_chat.prompts import Prompt, read_prompts
from medusa_chat.sampling import Sampling
from medusa_chat.settings_file import read_settings
from medusa_chat.stats import Stats
from medusa_chat.terminal.chat.command import Chat
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.conversation import read_conversation
from medusa_chat.terminal.chat.session import Session
from medusa_chat.training.data import Document, read_documents
from medusa_chat.training.observations import answers
from tests.helpers import nasty
from tests.helpers.complaints import complaint, refusal
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tiny import make_engine, random_backbone, tokenizer

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
NAMES = ("d.jsonl", "d.JSONL", "d.ndjson", "d.json", "d.txt", "d")
BOM = b"\xef\xbb\xbf"


def write(folder: Path, name: str, content: bytes | str | list[Any]) -> Path:
    """Write bytes, a text, or items as lines of JSON."""
    if isinstance(content, list):
        content = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in content)
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def prompts(file: Path) -> list[tuple[str, ...]]:
    return [prompt.turns for prompt in read_prompts([file])]


def talks(file: Path) -> list[Any]:
    return [document.messages or document.text for document in read_documents(file)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("form", ["lines", "CRLF", "list", "list on lines"])
def test_conversations_by_any_name(name: str, bom: bytes, form: str, tmp_path: Path) -> None:
    items = [{"messages": TALK}, {"messages": [*TALK, *TALK]}]
    text = {
        "lines": "\n".join(map(json.dumps, items)),
        "CRLF": "\r\n".join(map(json.dumps, items)),
        "list": json.dumps(items),
        "list on lines": json.dumps(items, indent=2),
    }[form]
    file = write(tmp_path, name, bom + text.encode())
    assert prompts(file) == [("Hi",), ("Hi", "Hi")]
    assert talks(file) == [tuple(TALK), (*TALK, *TALK)]


@pytest.mark.parametrize("name", ["d.txt", "d", "d.md"])
def test_plain_text_by_any_name(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, name, BOM + b"One\r\n[1] Two\n{x}\n")
    assert prompts(file) == [("One",), ("[1] Two",), ("{x}",)]
    assert talks(file) == ["One\n[1] Two\n{x}\n"]


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "d.json", json.dumps({"messages": TALK}, indent=1))
    assert prompts(file) == [("Hi",)]
    assert talks(file) == [tuple(TALK)]


def test_turns_that_are_a_text(tmp_path: Path) -> None:
    file = write(tmp_path, "p.jsonl", [{"turns": "Write a poem."}, {"turns": ["a", "b"]}])
    assert prompts(file) == [("Write a poem.",), ("a", "b")]
    for turns in (7, "", [], [""], ["a", 1], None, {"a": "b"}):
        file = write(tmp_path, "p.jsonl", [{"turns": "fine"}, {"turns": turns}])
        assert "p.jsonl, line 2: not a prompt" in refusal(read_prompts, [file])


def test_a_line_separator_inside_a_string_ends_nothing(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    item = {"messages": [{"role": "user", "content": text}, TALK[1]]}
    file = write(tmp_path, "d.jsonl", [item, item])
    assert prompts(file) == [(text,), (text,)]
    assert [messages[0]["content"] for messages in talks(file)] == [text, text]


def test_halves_of_surrogate_pairs_become_text(tmp_path: Path) -> None:
    asks = r'{"role": "user", "content": "a\ud83d"}'
    file = write(tmp_path, "d.jsonl", f'{{"messages": [{asks}, {json.dumps(TALK[1])}]}}')
    assert prompts(file) == [("a?",)]
    assert talks(file)[0][0]["content"] == "a?"
    whole = write(tmp_path, "e.jsonl", r'{"turns": ["\ud83d\ude00"]}')
    assert prompts(whole) == [("\N{GRINNING FACE}",)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"fine\ncaf\xe9\n", "line 2: not UTF-8"),
        (b'{"turns": ["a"]}\n\n{"turns": ["\xff"]}\n', "line 3: not UTF-8"),
        ("fine\n".encode("utf-16"), "line 1: not UTF-8"),
        (b'{"turns": ["a"]}\nplain', "line 2: not JSON"),
        (b'[{"turns": ["a"]},\n{"turns": ["b"]]', "line 2: not JSON"),
        (b'[{"turns": ["a"]}, {"turn": 1}]', "item 2: not a prompt"),
        (b'{"turns": ' + b"[" * 100_000, "line 1: not JSON"),
        (b'{"turns": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_loaded(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "prompts", content)
    # There is no such model, which only loading would find out.
    model = ("--model", "nobody/nothing")
    for command in ("bench", "verify"):
        line = complaint(capsys, command, *model, "--prompts", file)
        assert f"{file}, {expected}" in line
    line = complaint(capsys, "calibrate", *model, "--data", file)
    assert f"{file}, {expected}" in line
    line = complaint(capsys, "distill", *model, "--prompts", file, "--out", tmp_path / "o")
    assert f"{file}, {expected}" in line


def test_system_messages_reach_the_model() -> None:
    engine = make_engine(random_backbone(vocabulary=260))
    prompt = Prompt("c", ("Hi",), (SYSTEM, *TALK))  # type: ignore[arg-type]
    expected = engine.encode([SYSTEM, TALK[0]])  # type: ignore[arg-type]
    asked: list[list[int]] = []

    def answer(ids: list[int]) -> Turn:
        asked.append(ids)
        return Turn(Stats(), 0.0, 0.0, 0, "x")

    converse(engine, prompt, 1, answer)
    assert asked == [expected]
    sampling = Sampling(mode="vanilla", temperature=0, max_new_tokens=2)
    assert [ids for ids, _ in answers(engine, prompt, sampling)] == [expected]
    assert engine.encode(prompt.opening()) == expected


def test_an_empty_first_answer_ends_its_conversation_alone() -> None:
    """The template refuses an empty reply, as some do."""
    refusing = "{% if not m.content %}{{ raise_exception('an empty turn') }}{% endif %}"
    strict = f"{{% for m in messages %}}{refusing}{{{{ m.content }}}}{{% endfor %}}"
    mute = frozenset(range(320))  # each token ends a reply
    engine = make_engine(random_backbone(vocabulary=320), tokenizer=tokenizer(strict), eos=mute)
    prompt = Prompt("c", ("Hi", "And?"))
    said = converse(engine, prompt, 2, lambda _: Turn(Stats(), 0.0, 0.0, 0, ""))
    assert [turn.text for turn in said.turns] == [""]
    sampling = Sampling(mode="vanilla", max_new_tokens=2)
    assert len(list(answers(engine, prompt, sampling))) == 1


def test_a_file_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_chat.files.read_text.__defaults__", (1 << 16,))
    with pytest.raises(OSError, match="too large"):
        read_json(write(tmp_path, "long.json", b" " * (1 << 17)))


READERS = {
    "prompts": lambda file: read_prompts([file]),
    "documents": lambda file: list(read_documents(file)),
    "conversation": read_conversation,
    "models": read_models,
    "tree": lambda file: named_tree(str(file)),
    "accuracy": read_accuracy,
}
PIECES = st.sampled_from(nasty.PIECES)


@pytest.mark.parametrize("reader", READERS)
@given(content=st.binary(max_size=40) | st.lists(PIECES, max_size=8).map(b"".join))
@example(content=b"[" * 3000)
@example(content=b"a: &a [1]\nb: 2001-99-99\n")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_read_or_refused_in_one_line(
    reader: str, content: bytes, tmp_path: Path
) -> None:
    file = write(tmp_path, "any", content)
    refused = ""
    try:
        READERS[reader](file)
    except UserError as error:
        refused = str(error)
    assert "\n" not in refused


def test_a_pipe_that_nobody_writes_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.md"
    os.mkfifo(pipe)
    chat = Chat(Session(FakeEngine(), Sampling()))
    list(chat.session.ask("hello"))
    with nasty.no_hang(pipe):
        for call in (read_conversation, read_settings, read_config):
            assert "it is a device or a pipe" in refusal(call, pipe)
        for command in ("load", "save", "export"):
            assert str(pipe) in refusal(dispatch, chat, f"/{command} {pipe}")
    assert pipe.is_fifo()


def test_symbolic_links_that_go_round_are_one_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    words = f"cannot write {loop}: Too many levels of symbolic links"
    chat = Chat(Session(FakeEngine(), Sampling()))
    list(chat.session.ask("hello"))
    assert refusal(dispatch, chat, f"/save {loop}") == words
    with pytest.raises(UserError, match=re.escape(words)), only_writer(loop, "another run"):
        pass
    with pytest.raises(OSError, match="Too many levels"):
        check_folder(loop, set(), overwrite=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a Linux file system")
def test_a_place_that_takes_no_lock_is_not_said_to_be_in_use() -> None:
    with only_writer(Path("/proc/x"), "another run"):
        pass


def test_a_document_of_each_kind(tmp_path: Path) -> None:
    file = write(tmp_path, "d", json.dumps(["a text", {"text": "another"}, {"messages": TALK}]))
    documents = list(read_documents(file))
    assert documents[0] == Document(text="a text", place=f"{file}, item 1")
    assert documents[1].text == "another"
    assert documents[2].messages == tuple(TALK)
