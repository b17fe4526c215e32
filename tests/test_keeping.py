"""Kept conversations: what the database holds, whoever else writes, whatever fails."""

from __future__ import annotations

import io
import json
import sqlite3
from contextlib import closing, suppress
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from rich.console import Console

from medusa_chat.config import UserError
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.chat import archive as archives
from medusa_chat.terminal.chat.archive import Archive
from medusa_chat.terminal.chat.command import Chat, Draft, Result
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.conversation import read_conversation
from medusa_chat.terminal.chat.keeping import Keeper
from medusa_chat.terminal.chat.kept import Place
from medusa_chat.terminal.chat.session import Session
from tests.helpers.fake_engine import REPLY, FakeEngine
from tests.helpers.full_disk import full_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chats.db"


def open_chat(file: Path, *replies: str | BaseException, name: str = "fake") -> Chat:
    """A chat with an archive of its own, as a program of its own has it."""
    engine = FakeEngine(replies or (REPLY,))
    engine.name = name
    return Chat(
        Session(engine, Sampling(loop_guard="on")), keeper=Keeper(Archive(file), Place("m", "h"))
    )


def talk(chat: Chat, *texts: str) -> None:
    for text in texts:
        with suppress(KeyboardInterrupt):
            list(chat.keeper.watch(chat.session, chat.session.ask(text)))
        chat.keeper.write(chat.session)


def run(chat: Chat, line: str) -> str:
    result: Result = dispatch(chat, line)
    shown = result.note if isinstance(result, Draft) else result
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(shown)
    chat.keeper.write(chat.session)
    return out.getvalue()


def contents(file: Path, number: int = 1) -> list[str]:
    return [message["content"] for message in Archive(file).read(number).conversation.messages]


def test_a_conversation_is_kept_with_its_settings_and_heads(file: Path) -> None:
    chat = open_chat(file)
    chat.session.sampling = Sampling(mode="exact", stop=("\n\n",))
    talk(chat, "one \ud800", "two")
    kept = Archive(file).read(1)
    record = chat.session.record()
    assert kept.conversation.messages[1:] == record.messages[1:]
    assert kept.conversation.messages[0]["content"] == "one ?"
    assert (kept.conversation.sampling, kept.conversation.heads) == (record.sampling, record.heads)
    heads = {head for head, _ in kept.conversation.heads[1]}
    assert heads == {0, 1, 2, 3, 4}
    assert sum(length for _, length in kept.conversation.heads[1]) == len(REPLY)
    assert kept.place == Place("m", "h")
    files = [file, *file.parent.glob("chats.db-*")]
    assert {each.stat().st_mode & 0o777 for each in files} == {0o600}
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_a_growing_reply_is_written_once_a_second(file: Path) -> None:
    times = iter(range(0, 1000))
    chat = open_chat(file)
    chat.keeper = Keeper(Archive(file), clock=lambda: next(times) * 0.25)
    versions = []
    with closing(chat.keeper.watch(chat.session, chat.session.ask("hello"))) as steps:
        said = ""
        for number, step in enumerate(steps):
            if not number:
                assert contents(file) == ["hello"]
            said += step.text
            versions.append(Archive(file).read(1).version)
            if number >= 8:
                assert contents(file)[1] in said
                assert len(contents(file)[1]) > len(said) / 3
    assert len(set(versions)) == len(versions) // 4 + 1  # the clock is read once a step


def test_undo_regen_and_another_reply_are_followed(file: Path) -> None:
    chat = open_chat(file, "first", "second", "third")
    talk(chat, "one")
    list(chat.keeper.watch(chat.session, chat.session.regen()))
    chat.keeper.write(chat.session)
    assert contents(file) == ["one", "second"]
    run(chat, "/replies 1")
    assert contents(file) == ["one", "first"]
    talk(chat, "two")
    run(chat, "/undo")
    assert contents(file) == ["one", "first"]
    run(chat, "/undo")
    with pytest.raises(UserError, match="no chat is kept yet"):
        run(chat, "/chats")


def test_a_message_without_a_reply_comes_back(file: Path) -> None:
    chat = open_chat(file, REPLY, KeyboardInterrupt())
    talk(chat, "one", "two")
    assert len(chat.session.messages) == 2
    run(chat, "/set seed 1")
    other = open_chat(file)
    result = dispatch(other, "/resume 1")
    assert isinstance(result, Draft)
    assert (result.text, result.replaces) == ("two", False)
    assert [message["content"] for message in other.session.messages] == ["one", REPLY]
    talk(other, "three")
    assert contents(file)[2:] == ["three", REPLY]


def test_chats_are_listed_searched_named_and_resumed(file: Path) -> None:
    chat = open_chat(file)
    talk(chat, "Über den Fluss")
    run(chat, "/exact")
    run(chat, "/set temperature 0.3")
    assert "called fox tale" in run(chat, "/name  fox   tale")
    run(chat, "/reset")
    talk(chat, "second\x1b[2J thing", "more")
    listed = run(chat, "/chats").splitlines()
    assert listed[0].split()[:2] == ["▸", "2"]
    assert "second thing" in listed[0]
    assert "2 turns" in listed[0]
    assert listed[1].split()[:3] == ["1", "fox", "tale"]
    assert run(chat, "/chats ÜBER fox").startswith("  1")
    assert "1" in run(chat, "/chats TALE")
    with pytest.raises(UserError, match="no kept chat holds these words"):
        run(chat, "/chats fox unicorn")
    shown = run(chat, "/resume FOX")
    assert "› Über den Fluss" in shown
    assert REPLY[:40] in shown
    assert "chat 1 (fox tale), 2 messages, with its settings: mode exact, temperature 0.3" in shown
    assert "held with" not in shown
    assert chat.session.sampling == Sampling(mode="exact", temperature=0.3, loop_guard="on")
    assert list(chat.keeper.names()) == ["fox tale"]
    talk(chat, "again")
    assert len(contents(file)) == 4
    other = open_chat(file, name="other")
    assert "held with fake, you now chat with other" in " ".join(run(other, "/resume 1").split())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/resume 9", "no kept chat '9'"),
        ("/resume nobody", "no kept chat 'nobody'; /chats lists them"),
        ("/resume fox", "'fox' begins the names of several chats: fox two, fox one"),
        ("/resume", "usage: /resume"),
        ("/forget", "usage: /forget"),
        ("/name", "usage: /name NAME"),
        ("/name 12", "a name has a letter"),
        ("/name fox one", "chat 1 has this name"),
        ("/fork fox one", "another chat is called fox one"),
        ("/export", "usage: /export"),
        ("/export talk.pdf", r"talk\.pdf must end in \.md, \.html, \.svg or \.json"),
    ],
)
def test_mistakes_are_one_line(file: Path, line: str, complaint: str) -> None:
    chat = open_chat(file)
    talk(chat, "one")
    run(chat, "/name fox one")
    run(chat, "/reset")
    talk(chat, "two")
    run(chat, "/name fox two")
    with pytest.raises(UserError, match=complaint):
        run(chat, line)
    assert len(Archive(file).summaries()) == 2


def test_a_fork_leaves_the_original_alone(file: Path) -> None:
    chat = open_chat(file)
    with pytest.raises(UserError, match="nothing to copy"):
        run(chat, "/fork")
    talk(chat, "one")
    assert "chat 2" in run(chat, "/fork other way")
    talk(chat, "two")
    assert len(contents(file, 1)) == 2
    assert len(contents(file, 2)) == 4
    assert Archive(file).find("other way").number == 2


def test_nothing_private_is_kept(file: Path) -> None:
    chat = open_chat(file)
    chat.keeper.private = True
    talk(chat, "secret")
    assert not file.exists()
    with pytest.raises(UserError, match="is not kept; /private off"):
        run(chat, "/name x")
    run(chat, "/private off")
    assert contents(file) == ["secret", REPLY]
    assert "/forget 1 deletes what was kept" in run(chat, "/private")
    talk(chat, "more")
    assert contents(file) == ["secret", REPLY]


def test_what_is_forgotten_is_in_no_file(file: Path) -> None:
    chat = open_chat(file)
    talk(chat, "my secret word")
    assert b"secret" in b"".join(each.read_bytes() for each in file.parent.iterdir())
    assert "forgot chat 1" in run(chat, "/forget 1")
    talk(chat, "more of the secret")
    assert b"secret" not in b"".join(each.read_bytes() for each in file.parent.iterdir())
    run(chat, "/reset")
    talk(chat, "new")
    assert contents(file, 2) == ["new", REPLY]


def test_two_chats_at_once_have_their_own_rows(file: Path) -> None:
    first, second = open_chat(file), open_chat(file)
    streams = [
        chat.keeper.watch(chat.session, chat.session.ask(text))
        for chat, text in ((first, "one"), (second, "two"))
    ]
    for stream in (*streams, *streams):
        next(stream)
    for stream, chat in zip(streams, (first, second), strict=True):
        list(stream)
        chat.keeper.write(chat.session)
    assert [contents(file, number)[0] for number in (1, 2)] == ["one", "two"]
    assert first.session.engine.notices == second.session.engine.notices == []


def test_a_chat_that_goes_on_twice_becomes_two(file: Path) -> None:
    first = open_chat(file)
    talk(first, "one")
    second = open_chat(file)
    run(second, "/resume 1")
    talk(second, "from the second")
    talk(first, "from the first")
    assert "yours is kept as chat 2" in first.session.engine.notices[0]
    assert contents(file, 1)[2] == "from the second"
    assert contents(file, 2)[2] == "from the first"
    run(second, "/forget 2")
    talk(first, "more")
    assert "forgotten in another chat" in first.session.engine.notices[1]
    assert [each.number for each in Archive(file).summaries()] == [1]


def test_a_database_in_use_is_written_later(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "WAIT_SECONDS", 0.05)
    chat = open_chat(file)
    talk(chat, "one")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        talk(chat, "two")
        assert contents(file) == ["one", REPLY]
        other.execute("ROLLBACK")
    talk(chat, "three")
    assert len(contents(file)) == 6
    assert chat.session.engine.notices == []


def _damage(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"no database" * 1000)


def _newer(file: Path) -> None:
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA user_version = 99")


def _half(file: Path) -> None:
    talk(open_chat(file), *["muchtext" * 250] * 20)
    file.write_bytes(file.read_bytes()[:8192])


def _folder(file: Path) -> None:
    file.mkdir(parents=True)


def _blocked(file: Path) -> None:
    file.parent.write_text("a file in place of the folder")


@pytest.mark.parametrize("damage", [_damage, _newer, _half, _folder, _blocked])
def test_a_database_that_cannot_be_used_is_one_notice(
    file: Path, damage: Callable[[Path], None]
) -> None:
    damage(file)
    chat = open_chat(file)
    talk(chat, "one", "two", "three")
    assert len(chat.session.messages) == 6
    (notice,) = chat.session.engine.notices
    assert notice.startswith(f"this conversation is not kept: {file.parent}")
    assert "\n" not in notice
    with pytest.raises(UserError, match=str(file.parent)):
        run(chat, "/chats")


def test_a_full_disk_is_one_notice_until_there_is_space(file: Path) -> None:
    chat = open_chat(file)
    talk(chat, "one")
    with full_disk() as limit:
        limit(70_000)
        talk(chat, "two" * 70_000, "three")
        (notice,) = chat.session.engine.notices
        assert notice.startswith(f"this conversation is not kept: {file}: ")
        assert contents(file)[:2] == ["one", REPLY]
    assert len(chat.session.messages) == 6
    talk(chat, "four")
    assert len(contents(file)) == 8


def test_settings_of_another_version_do_not_matter(file: Path) -> None:
    talk(open_chat(file), "one")
    with closing(sqlite3.connect(file)) as connection, connection:
        settings = {"system": "S", "sampling": {"heat": 1, "mode": "exact", "seed": "x"}}
        connection.execute("UPDATE chats SET settings = ?", (json.dumps(settings),))
        connection.execute("UPDATE messages SET heads = '[[0, 4]]'")
    kept = Archive(file).read(1)
    assert kept.conversation.sampling == Sampling(mode="exact")
    assert kept.conversation.heads == ((), ())
    assert kept.place == Place()


@pytest.mark.parametrize(
    "value", ["x'ff00'", "1e300", "-1e18", "'text'", "char(27) || ']0;title' || char(7)"]
)
@pytest.mark.parametrize(
    "column", ["chats.name", "chats.model", "chats.changed", "chats.settings", "messages.role"]
)
def test_a_damaged_value_is_one_line_and_hides_no_other_chat(
    column: str, value: str, file: Path
) -> None:
    for text in ("one", "two"):
        talk(open_chat(file), text)
    table, name = column.split(".")
    key = "number" if table == "chats" else "chat"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"UPDATE {table} SET {name} = {value} WHERE {key} = 1")
    chat = open_chat(file)
    assert "two" in run(chat, "/chats")
    assert chat.keeper.names() is not None
    with suppress(UserError):
        run(chat, "/resume 1")
    assert "two" in run(chat, "/resume 2")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('chats SET settings = \'{"place": "x"}\'', "its settings are damaged"),
        ("chats SET settings = x'ff'", ""),
        ("messages SET content = x'ff00'", "a message of it is damaged"),
        ("messages SET role = 'tool'", "a message of it is damaged"),
    ],
)
def test_a_damaged_conversation_is_named_with_its_file(
    change: str, reason: str, file: Path
) -> None:
    talk(open_chat(file), "one")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"UPDATE {change}")
    chat = open_chat(file)
    run(chat, "/chats")
    with pytest.raises(UserError, match=f"{file}: .*{reason}"):
        run(chat, "/resume 1")


@pytest.mark.parametrize("heads", ["'{'", "x'ff'", f"'{'[' * 100_000}'"])
def test_damaged_colours_lose_no_message(heads: str, file: Path) -> None:
    talk(open_chat(file), "one")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"UPDATE messages SET heads = {heads}")
    assert contents(file) == ["one", REPLY]


CODE = "Look:\n\n```python\nprint(1)\n```\n\n<script>alert(1)</script> & more\n"


def test_exports(file: Path, tmp_path: Path) -> None:
    chat = open_chat(file, CODE)
    with pytest.raises(UserError, match="nothing to export"):
        run(chat, f"/export {tmp_path}/x.md")
    talk(chat, "Show me\x1b[31m")
    run(chat, "/name my talk")
    for suffix in ("md", "html", "svg", "json"):
        path = tmp_path / f"my talk.{suffix}"
        assert "wrote 2 messages" in run(chat, f"/export {path}")
        run(chat, f"/export {path}")  # over an export
        text = path.read_text()
        assert "Look" in text
        assert path.stat().st_mode & 0o777 == 0o600
        if suffix in ("html", "svg"):
            assert "<script>" not in text
            assert "my" in text
            assert "#2c64ed" in text  # the colour of head 1
            assert "\x1b" not in text
        if suffix == "svg":
            ElementTree.fromstring(text)
    markdown = (tmp_path / "my talk.md").read_text()
    assert markdown.startswith("# my talk\n\nfake · mode greedy\n")
    assert f"## fake\n\n{CODE}" in markdown
    saved = read_conversation(tmp_path / "my talk.json")
    assert saved == chat.session.record()
    other = open_chat(file)
    run(other, f"/load {tmp_path}/my talk.json")
    assert other.session.record().heads == saved.heads


def test_an_export_replaces_nothing_else(file: Path, tmp_path: Path) -> None:
    chat = open_chat(file)
    talk(chat, "one")
    for name in ("thesis.md", "thesis.json"):
        path = tmp_path / name
        path.write_text("years of work")
        with pytest.raises(UserError, match="choose another name"):
            run(chat, f"/export {path}")
        assert path.read_text() == "years of work"
    with pytest.raises(UserError, match=r"cannot write .*x\.md: No such file"):
        run(chat, f"/export {tmp_path}/absent/x.md")
