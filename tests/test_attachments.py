"""Files in a message: found, framed, counted; refused in one line before they are read whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from medusa_chat.config import UserError
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.chat.attachments import reference, with_files
from medusa_chat.terminal.chat.command import Chat, Draft
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.completion import CommandCompleter
from medusa_chat.terminal.chat.session import Session
from tests.helpers.fake_engine import FakeEngine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("one two\nthree\n")
    (tmp_path / "my notes.md").write_text("```\ncode\n```\n")
    return tmp_path


def test_a_file_is_sent_in_a_frame_with_its_name(notes: Path) -> None:
    assert notes
    sent = with_files("Sum up @notes.txt, please.", FakeEngine())
    frame = "File notes.txt:\n```\none two\nthree\n```"
    assert sent.text == f"Sum up notes.txt, please.\n\n{frame}"
    assert sent.notes == ("notes.txt · 3 tokens",)


def test_quotes_hold_spaces_and_a_fence_is_longer_than_those_in_it(notes: Path) -> None:
    assert notes
    sent = with_files('@"my notes.md" and @notes.txt and @notes.txt', FakeEngine())
    assert sent.text.startswith("my notes.md and notes.txt and notes.txt\n\n")
    assert "File my notes.md:\n````\n```\ncode\n```\n````" in sent.text
    assert sent.text.count("File notes.txt:") == 1
    assert len(sent.notes) == 2


def test_words_that_are_no_files_stay_text() -> None:
    text = "ask @anna or mail me@x.org (@ noon) @property"
    assert with_files(text, FakeEngine()).text == text
    assert with_files(text, FakeEngine()).notes == ()
    sent = with_files("read @nots.txt.", FakeEngine())
    assert sent.text == "read @nots.txt."
    assert sent.notes == ("there is no file nots.txt: sent as text",)
    assert with_files("@" + "x" * 5000, FakeEngine()).notes == ()


def test_what_does_not_fit_or_is_no_text_is_one_line(notes: Path) -> None:
    with (notes / "big.log").open("wb") as big:
        big.truncate(50_000_000)
    (notes / "long.txt").write_text("word " * 2000)
    (notes / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (notes / "zeros.bin").write_bytes(b"abc\0def")
    (notes / "folder").mkdir()
    (notes / "gone.txt").symlink_to("nowhere.txt")
    for name, complaint in {
        "big.log": "big.log (50.0 MB) is too large for the context of fake (1,024 tokens)",
        "long.txt": "long.txt (2,000 tokens) is too large for the context of fake (1,024 tokens)",
        "/dev/zero": "cannot read /dev/zero: it is a device or a pipe, not a file",
        "folder": "folder is a folder; name a file in it",
        "picture.png": "picture.png is no text: line 1: not UTF-8 (invalid start byte)",
        "zeros.bin": "zeros.bin is no text: it holds zero bytes",
        "gone.txt": "cannot read gone.txt: No such file or directory",
    }.items():
        for line in (f"@{name}", f"/file {name}"):
            assert _complaint(line) == complaint


def _complaint(line: str) -> str:
    try:
        if line.startswith("/"):
            dispatch(Chat(Session(FakeEngine(), Sampling())), line)
        else:
            with_files(line, FakeEngine())
    except UserError as error:
        return str(error)
    return "none"


def test_the_command_begins_the_next_message_with_the_file(notes: Path) -> None:
    chat = Chat(Session(FakeEngine(), Sampling()))
    draft = dispatch(chat, "/file my notes.md")
    assert draft == Draft('@"my notes.md" ', replaces=False, note="my notes.md · 3 tokens")
    assert reference(notes / "notes.txt") == f"@{notes}/notes.txt"


def test_file_names_are_completed_after_an_at_sign(notes: Path) -> None:
    assert notes
    completer = CommandCompleter(lambda: None)

    def completions(text: str) -> list[str]:
        found = completer.get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + each.start_position] + each.text for each in found]

    assert completions("look at @no") == ["look at @notes.txt"]
    assert completions("@my") == ['@"my notes.md"']
    assert completions('@"my') == ['@"my notes.md']
    assert completions("a@no") == []
    assert completions("two\nlines @no") == ["two\nlines @notes.txt"]
