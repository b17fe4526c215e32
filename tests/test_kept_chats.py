"""Kept conversations in a real pseudo-terminal: ended at any moment, resumed, two at once."""

from __future__ import annotations

import random
import signal
import termios
import time
from typing import TYPE_CHECKING

import pytest

from medusa_chat.terminal.chat.archive import Archive
from tests.helpers.fake_engine import REPLY
from tests.helpers.pseudo_terminal import CTRL_D, ENTER, ROOT, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FAKE_CHAT = str(ROOT / "tests" / "helpers" / "fake_engine.py")
QUESTION = "Tell me a long fairy tale."
LONG = ("--max-new-tokens", "900", "--ignore-eos", "--mode", "vanilla", "--engine", "torch")
SLACK = 1.0  # seconds that a busy machine may take from a step to the screen
ONE_TOKEN = 20  # letters
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def run(*command: str, environment: dict[str, str] | None = None) -> Terminal:
        home = {"XDG_STATE_HOME": str(tmp_path), "MEDUSA_CHAT_DATA": str(tmp_path)}
        opened = Terminal(*command, columns=100, rows=40, environment=home | (environment or {}))
        started.append(opened)
        return opened

    yield run
    for terminal in started:
        terminal.child.close(force=True)


def squeezed(text: str) -> str:
    return "".join(text.split())


def said(terminal: Terminal, *, panel: bool) -> str:
    """The reply on the screen, without white space; the panel stands below a blank row."""
    lines = terminal.text.rstrip().split("\n")
    first = max((index for index, line in enumerate(lines) if QUESTION in line), default=len(lines))
    rows = lines[first + 1 :]
    if panel:
        rows = rows[: max((index for index, row in enumerate(rows) if not row), default=0)]
    return squeezed("\n".join(rows))


def reply(folder: Path) -> str:
    archive = Archive(folder / "chats.db")
    messages = archive.read(archive.latest().number).conversation.messages
    assert messages[0]["content"] == QUESTION
    return squeezed(messages[1]["content"] if len(messages) > 1 else "")


def end_in_a_reply(
    start: Callable[..., Terminal], folder: Path, number: signal.Signals, moment: float
) -> None:
    """End a chat with the bundled model at a moment of its reply; check what is kept."""
    terminal = start("-m", "medusa_chat.cli", "--view", "heads", *LONG)
    before = termios.tcgetattr(terminal.child.child_fd)
    terminal.see("■ 4 ahead")
    terminal.say(QUESTION)
    terminal.see(lambda _: bool(said(terminal, panel=True)))
    seen = [(time.monotonic(), "")]
    until = time.monotonic() + moment
    while time.monotonic() < until:
        terminal.read()
        seen.append((time.monotonic(), said(terminal, panel=True)))
    killed = time.monotonic()
    terminal.child.kill(number)
    status = terminal.status()
    kept = reply(folder)
    if number == signal.SIGKILL:
        old = [text for moment, text in seen if moment < killed - 1.0 - SLACK]
        assert kept.startswith(old[-1] if old else "")
        return
    assert status == 128 + number
    shown = said(terminal, panel=False)
    assert kept.startswith(shown)
    assert len(kept) - len(shown) <= ONE_TOKEN  # the signal may come between a step and its row
    assert not terminal.screen.cursor.hidden
    assert terminal.settings[3] == before[3]
    assert "Traceback" not in terminal.text


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGKILL, 2.6), (signal.SIGHUP, 0.4)])
def test_a_reply_that_is_ended_is_kept(
    start: Callable[..., Terminal], tmp_path: Path, number: signal.Signals, moment: float
) -> None:
    end_in_a_reply(start, tmp_path, number, moment)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_reply_that_is_ended_at_any_moment_is_kept(
    start: Callable[..., Terminal], tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
    end_in_a_reply(start, tmp_path, number, draw.uniform(0.0, 4.0))


def fake(folder: Path, *options: str) -> tuple[str, ...]:
    files = ("--history", str(folder / "history"), "--chats", str(folder / "chats.db"))
    return (FAKE_CHAT, *files, *options)


def test_yesterdays_chat_goes_on(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start(*fake(tmp_path, "--delay", "0.2"))
    terminal.say("Tell me a story")
    terminal.see("upon a time")
    time.sleep(1.3)
    terminal.child.kill(signal.SIGKILL)
    terminal.status()
    terminal = start(*fake(tmp_path, "--resume", "1"))
    terminal.see("■ 4 ahead")
    text = terminal.see("chat 1, 2 messages, with its settings: mode greedy")
    assert "› Tell me a story\nOnce upon a time" in text
    colours = {cell.fg for row in terminal.screen.buffer.values() for cell in row.values()}
    assert {"2c64ed", "e37814"} <= colours
    terminal.say("And then?")
    terminal.replies(1)
    terminal.say("/name fox tale")
    terminal.say("/chats")
    terminal.see(lambda text: "▸ 1  fox tale" in text and "2 turns" in text)
    terminal.say("/fork")
    terminal.see("a copy, chat 2")
    terminal.say("/forget 1")
    terminal.see("forgot chat 1 (fox tale)")
    terminal.say("/private on")
    terminal.see("nothing is kept from now on")
    terminal.say("a secret")
    terminal.replies(2)
    terminal.send(CTRL_D)
    assert terminal.status() == 0
    assert "secret" not in (tmp_path / "history").read_text()
    (kept,) = Archive(tmp_path / "chats.db").summaries()
    assert (kept.number, kept.turns) == (2, 2)


def test_a_message_without_a_reply_is_in_the_prompt_again(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = start(*fake(tmp_path, "--prefill", "20"))
    terminal.say("Tell me a story")
    terminal.see("reading the prompt")
    terminal.child.kill(signal.SIGKILL)
    terminal.status()
    terminal = start(*fake(tmp_path, "--resume", "1"))
    terminal.see("your last message has no reply yet")
    terminal.see("■ 4 ahead")
    terminal.see(lambda text: text.count("› Tell me a story") == 2)
    terminal.send(ENTER)
    terminal.replies(1)
    messages = Archive(tmp_path / "chats.db").read(1).conversation.messages
    assert [message["content"] for message in messages] == ["Tell me a story", REPLY]


def test_two_chats_at_once(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminals = [start(*fake(tmp_path, "--delay", "0.1")) for _ in range(2)]
    for index, terminal in enumerate(terminals):
        terminal.say(f"question {index}")
    for terminal in terminals:
        assert "not kept" not in terminal.replies(1)
        terminal.send(CTRL_D)
        assert terminal.status() == 0
    archive = Archive(tmp_path / "chats.db")
    kept = [archive.read(number).conversation.messages for number in (1, 2)]
    assert {messages[0]["content"] for messages in kept} == {"question 0", "question 1"}
    assert {messages[1]["content"] for messages in kept} == {REPLY}


def test_a_full_disk_and_a_path_that_is_no_folder(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    limited = ("-c", LIMITED, *fake(tmp_path, "--reply", "much text " * 4000))
    blocked = (FAKE_CHAT, "--chats", "/dev/full/chats.db", "--history", str(tmp_path / "h"))
    for command in (limited, blocked):
        terminal = start(*command)
        terminal.see("■ 4 ahead")
        terminal.say("one")
        terminal.replies(1)
        terminal.say("two")
        assert terminal.replies(2).count("this conversation is not kept:") == 1
        terminal.send(CTRL_D)
        assert terminal.status() == 0


def test_vi_keys(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start(*fake(tmp_path, "--editing", "vi"))
    terminal.see("vi keys · Ctrl+J new line")
    terminal.send("bad words")
    terminal.see("› bad words")
    terminal.send("\x1b")
    time.sleep(1.2)  # the time in which the key could begin a sequence
    terminal.send("0cegood\x1b")
    terminal.see("› good words")
    terminal.send(ENTER)
    terminal.replies(1)
    assert Archive(tmp_path / "chats.db").latest().title == "good words"
