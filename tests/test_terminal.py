"""The whole chat on the screen of a real pseudo-terminal, with an engine without a model."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest

from medusa_chat.config import UserError
from medusa_chat.stats import Stats
from medusa_chat.terminal.chat.repl import chat
from medusa_chat.terminal.chat.start import Start
from tests.helpers.fake_engine import REPLY, script
from tests.helpers.pseudo_terminal import (
    ALT_V,
    BACKSPACE,
    CTRL_C,
    CTRL_D,
    ENTER,
    NEW_LINE,
    ROOT,
    UP,
    Terminal,
    assert_colours,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FAKE_CHAT = str(ROOT / "tests" / "helpers" / "fake_engine.py")
STATS = Stats.of(script(REPLY))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def run(
        *options: str,
        columns: int = 80,
        no_color: str = "",
        environment: dict[str, str] | None = None,
    ) -> Terminal:
        command = (FAKE_CHAT, "--history", str(tmp_path / "history"), *options)
        environment = {"NO_COLOR": no_color} if no_color else environment
        started.append(Terminal(*command, columns=columns, environment=environment))
        return started[-1]

    yield run
    for terminal in started:
        terminal.child.close(force=True)


def test_a_session_from_the_first_message_to_exit(start: Callable[..., Terminal]) -> None:
    terminal = start()
    terminal.see("■ 4 ahead")
    terminal.say("Tell me a story")
    terminal.replies(1)
    row = next(row for row in range(30) if terminal.screen.display[row].startswith("Once upon"))
    assert_colours(terminal, row, script(REPLY))
    speedup = f"{STATS.speedup:.1f}x faster ({STATS.comparisons} comparisons)"
    footer = f"{STATS.acceptance_length:.1f} tokens per step · {speedup} · "
    assert f"{footer}{STATS.tokens_per_second:.1f} tokens/s" in terminal.text

    terminal.say("/typical")
    terminal.see("typical · temperature 0.7 · epsilon 0.09 · delta 0.3")
    terminal.see("fake · typical 0.7 · ")
    terminal.say("And another one")
    terminal.replies(2)

    terminal.say("/stats")
    text = terminal.see("prefill time")
    figures = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    assert figures["new tokens"] == [str(STATS.new_tokens), str(2 * STATS.new_tokens)]
    assert figures["acceptance length"][0] == f"{STATS.acceptance_length:.2f}"
    assert figures["step cost"][0] == f"{STATS.overhead:.2f}x"
    assert figures["speedup"][0] == f"{STATS.speedup:.2f}x"
    assert figures["tokens/s"][0] == f"{STATS.tokens_per_second:.1f}"
    terminal.say("/exit")
    assert terminal.status() == 0


def test_ctrl_c_stops_a_reply_and_keeps_its_text(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = start("--delay", "0.3")
    terminal.say("Tell me a story")
    text = terminal.see(lambda text: "speedup" in text and "tokens/s" in text)
    assert "Once upon a time" in text
    terminal.send(CTRL_C)
    terminal.see("[stopped]")
    terminal.see(lambda _: terminal.at_prompt)
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 2 messages")
    saved = (tmp_path / "talk.json").read_text()
    assert "Once upon a time" in saved
    assert "river" not in saved
    terminal.send(UP + UP)
    terminal.see("› Tell me a story\n")
    terminal.send(CTRL_C)
    terminal.send(CTRL_D)
    assert terminal.status() == 0


def test_ctrl_c_before_the_first_token(start: Callable[..., Terminal]) -> None:
    terminal = start("--prefill", "20")
    terminal.say("Tell me a story")
    terminal.see("reading the prompt…")
    terminal.send(CTRL_C)
    terminal.see("[stopped] before the first word")
    terminal.see(lambda _: terminal.at_prompt)
    terminal.say("/undo")
    terminal.see("there is nothing to take back")
    terminal.send(CTRL_D)
    assert terminal.status() == 0


def test_each_reply_begins_with_reading_the_prompt(start: Callable[..., Terminal]) -> None:
    terminal = start("--prefill", "1")
    for count in (1, 2):
        terminal.say("Tell me a story")
        terminal.see("reading the prompt…")
        terminal.replies(count)


def test_ctrl_c_at_the_prompt_clears_or_hints(start: Callable[..., Terminal]) -> None:
    terminal = start()
    terminal.see("Alt+Enter new line")
    terminal.send(CTRL_C)
    terminal.see("Ctrl+D or /exit leaves")
    terminal.send("draft")
    terminal.see("› draft")
    terminal.send(CTRL_C)
    terminal.see(lambda text: "draft" not in text)
    terminal.send(CTRL_D)
    assert terminal.status() == 0


def test_several_lines_are_one_message(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start()
    terminal.see("■ 4 ahead")
    terminal.send("\x1b[200~one\rtwo\nthree\x1b[201~")
    terminal.see("three")
    terminal.send(NEW_LINE + "four\nfive" + ENTER)
    terminal.replies(1)
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 2 messages")
    assert r'"one\ntwo\nthree\nfour\nfive"' in (tmp_path / "talk.json").read_text()


def test_a_message_typed_while_the_model_loads_is_answered(start: Callable[..., Terminal]) -> None:
    terminal = start("--load", "2.5", "--notice", "the tree was pruned")
    terminal.see("loading fake…")
    terminal.say("Tell me a story")
    terminal.see("your message is next")
    text = terminal.replies(1)
    assert text.index("■ the model") < text.index("the tree was pruned") < text.index("Once upon")
    assert "your message is next" not in text


def test_a_half_typed_message_is_kept_when_the_model_is_loaded(
    start: Callable[..., Terminal],
) -> None:
    terminal = start("--load", "1.5")
    terminal.see("loading fake…")
    terminal.send("half a mess")
    text = terminal.see("■ the model")
    assert text.index("a library warns") < text.index("■ the model")
    terminal.send("age" + ENTER)
    assert "\n› half a message\n" in terminal.replies(1)


def test_leaving_while_the_model_loads(start: Callable[..., Terminal]) -> None:
    for leave in (CTRL_D, "/exit" + ENTER):
        terminal = start("--load", "600")
        terminal.see("loading fake…")
        terminal.send(leave)
        assert terminal.status() == 0


def test_a_model_that_cannot_be_loaded(start: Callable[..., Terminal]) -> None:
    for keys in ("", "hello" + ENTER):
        terminal = start("--load", "1", "--load-error", "no such model: oak")
        terminal.see("loading fake…")
        terminal.send(keys)
        terminal.see("medusa-chat: error: no such model: oak")
        assert terminal.status() == 2
        assert "Traceback" not in terminal.text


def test_keys_typed_during_a_reply_wait_for_the_prompt(start: Callable[..., Terminal]) -> None:
    terminal = start("--delay", "0.2")
    terminal.say("one")
    terminal.see("tokens/s")
    terminal.send("two" + ENTER)
    for _ in range(3):
        terminal.read()
        assert "two" not in terminal.text
    text = terminal.replies(2)
    assert text.count("› two") == 1
    assert text.count("two") == 1


def test_a_reply_in_a_terminal_that_grows(start: Callable[..., Terminal]) -> None:
    terminal = start("--delay", "0.15", columns=40)
    terminal.say("Tell me a story")
    terminal.see("faster")
    terminal.screen.resize(columns=72)
    terminal.child.setwinsize(30, 72)
    text = terminal.replies(1)
    assert "".join(REPLY.split()) in "".join(text.split())
    assert max(map(len, text.splitlines())) > 40


def test_a_full_context_says_what_to_do(start: Callable[..., Terminal]) -> None:
    terminal = start("--finish", "context")
    terminal.say("hello")
    text = terminal.replies(1)
    assert " · context is full" in text
    terminal.see("the context is full: /undo takes the last turn back, /reset starts")


def test_the_models_defaults_and_a_reply_that_repeats_itself(
    start: Callable[..., Terminal],
) -> None:
    defaults = '{"mode": "exact", "temperature": 0.6, "top_p": 0.95}'
    terminal = start("--finish", "loop", "--defaults", defaults, columns=100)
    terminal.see("defaults of the model: mode exact, temperature 0.6, top-p 0.95")
    terminal.say("hello")
    assert " · repeats itself" in terminal.replies(1)
    terminal.see("the reply repeated itself, so it was stopped: /continue goes on")
    terminal.say("/continue")
    terminal.replies(2)
    terminal.say("/set loop-guard off")
    terminal.see("loop_guard off")
    terminal.say("/set temperature 0.4")
    terminal.say("/greedy")
    terminal.say("/set temperature 0.3")
    text = terminal.see("temperature 0.3 · greedy mode does not use temperature; exact and typical")
    terminal.say("/set temperature 0.2")
    text = terminal.see(lambda shown: "temperature 0.2" in map(str.strip, shown.splitlines()))
    assert text.count("greedy mode does not use") == 1


def test_engine_failures_end_the_reply_only(start: Callable[..., Terminal]) -> None:
    terminal = start("--fails-after", "3")
    terminal.say("hello")
    terminal.see("out of memory: CUDA out of memory. (/undo")
    terminal.see(lambda _: terminal.at_prompt)
    assert "Once upon a time" in terminal.text
    assert "Traceback" not in terminal.text
    terminal.say("/nonsense")
    terminal.see("unknown command /nonsense")
    terminal.say("//not a command")
    terminal.see(lambda text: text.count("out of memory:") == 2)
    terminal.send(CTRL_D)
    assert terminal.status() == 0


def test_a_transcript_is_kept_and_continued(start: Callable[..., Terminal], tmp_path: Path) -> None:
    transcript = tmp_path / "talk.json"
    terminal = start("--transcript", str(transcript))
    terminal.say("one")
    terminal.replies(1)
    second = start("--transcript", str(transcript))
    second.see("another chat is writing to ")
    assert second.status() != 0
    terminal.send(CTRL_D)
    assert terminal.status() == 0
    terminal = start("--transcript", str(transcript))
    terminal.see("continuing with 2 messages")
    terminal.say("two")
    terminal.replies(1)
    assert transcript.read_text().count('"user"') == 2
    terminal.say("/reset")
    terminal.see("new conversation")
    terminal.say("three")
    terminal.see("replace it? (y/n)")
    terminal.send("n" + ENTER)
    terminal.see("this conversation goes to")
    terminal.see(lambda _: terminal.at_prompt)
    assert transcript.read_text().count('"user"') == 2
    assert (tmp_path / "talk-2.json").read_text().count('"user"') == 1


def test_a_message_is_edited_and_answered_anew(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = start()
    terminal.say("Tell me a stori")
    terminal.replies(1)
    terminal.say("/edit")
    terminal.see("› Tell me a stori\n")
    terminal.send(BACKSPACE + "y" + ENTER)
    terminal.replies(2)
    terminal.say("/edit")
    terminal.see(lambda text: text.count("› Tell me a story") == 2)
    terminal.send(CTRL_C)  # drops the edit, not the message
    terminal.say("More")
    terminal.replies(3)
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 4 messages")
    assert '"Tell me a story"' in (tmp_path / "talk.json").read_text()


def test_a_stopped_reply_goes_on(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start("--delay", "0.2")
    terminal.say("Tell me a story")
    terminal.see("upon a time")
    terminal.send(CTRL_C)
    terminal.see("[stopped]")
    terminal.see(lambda _: terminal.at_prompt)
    terminal.say("/continue")
    terminal.replies(2)
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 2 messages")
    assert (tmp_path / "talk.json").read_text().count("Once upon a time") == 2


def test_a_race_and_one_that_is_stopped(start: Callable[..., Terminal]) -> None:
    terminal = start("--delay", "0.05")
    before = termios.tcgetattr(terminal.child.child_fd)
    terminal.say("Tell me a story")
    terminal.replies(1)
    terminal.say("/race")
    terminal.see("runs first, alone")
    terminal.see("│ with heads · greedy")
    terminal.see("the same text")
    terminal.see(lambda _: terminal.at_prompt)
    terminal.say("/race And you?")
    terminal.see(lambda text: text.count("│ with heads · greedy") == 2)
    terminal.send(CTRL_C)
    text = terminal.see("race stopped; the conversation is as it was")
    terminal.see(lambda _: terminal.at_prompt)
    assert text.count("│ with heads · greedy") == 1
    terminal.say("/stats")
    text = terminal.see("prefill time")
    assert f"{STATS.new_tokens:>3}" in next(row for row in text.splitlines() if "new tokens" in row)
    terminal.send(CTRL_D)
    assert terminal.status() == 0
    assert terminal.settings[3] == before[3]


def test_files_go_with_a_message(start: Callable[..., Terminal], tmp_path: Path) -> None:
    notes = tmp_path / "n.txt"
    notes.write_text("The fox is red.\n")
    terminal = start(columns=120)
    terminal.say(f"Sum up @{notes}")
    text = terminal.replies(1)
    assert f"› Sum up @{notes}\n{notes} · 4 tokens\n" in text
    terminal.say("/edit")
    terminal.see(lambda text: text.count(f"› Sum up @{notes}") == 2)
    terminal.send("?" + ENTER)
    terminal.replies(2)
    terminal.say(f"/file {notes}")
    terminal.see(lambda text: text.count(" · 4 tokens") == 3)
    terminal.see(f"› @{notes}\n")
    terminal.send("again" + ENTER)
    terminal.replies(3)
    terminal.say("and @/dev/zero")
    terminal.see("cannot read /dev/zero: it is a device or a pipe, not a file")
    terminal.send(UP)
    terminal.see(lambda text: text.count("› and @/dev/zero") == 2)
    terminal.send(CTRL_C)
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 4 messages")
    assert (tmp_path / "talk.json").read_text().count("The fox is red.") == 2


def test_thoughts_are_folded_and_ctrl_t_shows_them(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    reply = "<think>They want a story about a fox.</think>\n\nThe fox was **red**."
    terminal = start("--reply", reply, "--delay", "0.1")
    terminal.say("Tell me")
    terminal.see("thinking… ")
    text = terminal.replies(1)
    assert "thought for 7 tokens · Ctrl+T shows\n\nThe fox was red.\n" in text
    assert "about a fox" not in text
    terminal.send("half\x14")
    terminal.see("They want a story about a fox.")
    text = terminal.see("› half")
    assert text.index("They want") < text.index("› half")
    terminal.send(" a message" + ENTER)
    text = terminal.replies(2)
    assert "› half a message\nThey want a story about a fox.\nthought for 7 tokens\n" in text
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 4 messages")
    assert (tmp_path / "talk.json").read_text().count("about a fox.</think>") == 2
    terminal.say("/think off")
    terminal.see("thinking: off")


def test_exit_alone_asks_what_was_meant(start: Callable[..., Terminal]) -> None:
    terminal = start()
    terminal.say("exit")
    terminal.see("/exit leaves, Ctrl+D too; type exit once more to send it")
    terminal.say("exit")
    terminal.replies(1)
    terminal.say("/bye")
    assert terminal.status() == 0


def test_quotes_open_and_close_several_lines(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = start()
    terminal.say('"""one')
    terminal.send("two" + ENTER)
    terminal.see("  two")
    terminal.send('three"""' + ENTER)
    terminal.replies(1)
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 2 messages")
    assert r'"one\ntwo\nthree"' in (tmp_path / "talk.json").read_text()


def test_a_long_paste_is_echoed_folded(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start()
    terminal.see("■ 4 ahead")
    lines = "\r".join(f"line {number}" for number in range(200))
    terminal.send(f"\x1b[200~{lines}\x1b[201~")
    terminal.see("line 199")
    terminal.send(ENTER)
    text = terminal.replies(1)
    assert "› line 0\n" in text
    assert "  … 192 more lines …\n  line 198\n  line 199\n" in text
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 2 messages")
    assert r"line 100\nline 101" in (tmp_path / "talk.json").read_text()


CODE = "Look:\n\n```python\nprint(1)\n```\n\n| a | b |\n| - | - |\n| **c** | d |\n"


def test_markdown_is_rendered_and_the_view_switched(start: Callable[..., Terminal]) -> None:
    terminal = start("--reply", CODE)
    terminal.say("Show me")
    text = terminal.replies(1)
    assert "```python\nprint(1)\n```\n\na   b\n─────\nc   d\n" in text
    terminal.send(ALT_V)
    terminal.see("view: heads")
    terminal.say("Again")
    assert "| **c** | d |" in terminal.replies(2)
    terminal.say("/view markdown")
    terminal.see("markdown: finished blocks are rendered")


@pytest.mark.parametrize("setting", ["--plain", "TERM=dumb"])
def test_plain_mode_redraws_nothing(start: Callable[..., Terminal], setting: str) -> None:
    if setting == "--plain":
        terminal = start(setting, "--load", "1")
    else:
        terminal = start("--load", "1", environment={"TERM": "dumb"})
    terminal.send("Tell me a story\r")
    text = terminal.see("tokens per step")
    assert "loading fake…" in text
    terminal.send("/exit\r")
    assert terminal.status() == 0
    assert "reading the prompt" not in terminal.raw
    assert "tokens per step" in terminal.raw
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.raw)
    assert not re.search(r"[\x1b\x08]|\r[^\n]", shown)
    assert "Once upon a time a small fox" in shown


def test_plain_mode_folds_thoughts(start: Callable[..., Terminal]) -> None:
    terminal = start("--plain", "--reply", "<think>It is a fox.</think>The fox.")
    terminal.send("Who?\r")
    text = terminal.see("tokens per step")
    assert "thought for 4 tokens · /thoughts shows\n\nThe fox.\n" in text
    terminal.send("/thoughts\r")
    terminal.see("It is a fox.")


def test_ctrl_c_while_a_message_waits_for_the_model(start: Callable[..., Terminal]) -> None:
    terminal = start("--load", "4")
    terminal.say("Tell me a story")
    terminal.see("your message is next")
    terminal.send(CTRL_C)
    terminal.see("not sent")
    terminal.see("■ 4 ahead")
    terminal.send(UP + ENTER)
    terminal.replies(1)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGXCPU]
)
def test_a_signal_that_ends_the_chat_leaves_the_terminal_as_it_was(
    start: Callable[..., Terminal], tmp_path: Path, number: signal.Signals
) -> None:
    transcript = tmp_path / "talk.json"
    terminal = start("--delay", "0.2", "--transcript", str(transcript))
    before = termios.tcgetattr(terminal.child.child_fd)
    terminal.say("Tell me a story")
    terminal.see("upon a time")
    terminal.child.kill(number)
    assert terminal.status() == 128 + number
    assert not terminal.screen.cursor.hidden
    assert "tokens/s" not in terminal.text  # the panel is gone
    assert terminal.settings[3] == before[3]
    assert "Once upon a time" in transcript.read_text()
    assert transcript.stat().st_mode & 0o777 == 0o600


def test_sigterm_at_the_prompt(start: Callable[..., Terminal]) -> None:
    terminal = start()
    before = termios.tcgetattr(terminal.child.child_fd)
    terminal.see("■ 4 ahead")
    terminal.child.kill(signal.SIGTERM)
    assert terminal.status() == 128 + signal.SIGTERM
    assert terminal.settings[3] == before[3]
    assert "Traceback" not in terminal.text


def test_ctrl_z_and_back(start: Callable[..., Terminal]) -> None:
    terminal = start("--delay", "0.2")
    before = termios.tcgetattr(terminal.child.child_fd)
    terminal.say("Tell me a story")
    terminal.see("upon a time")
    terminal.send("\x1a")
    terminal.see(lambda _: not terminal.screen.cursor.hidden)
    assert termios.tcgetattr(terminal.child.child_fd)[3] == before[3]
    assert "tokens/s" not in terminal.text
    terminal.child.kill(signal.SIGCONT)
    terminal.see(lambda _: terminal.screen.cursor.hidden)
    text = terminal.replies(1)
    assert "".join(REPLY.split())[-40:] in "".join(text.split())


def test_columns_of_the_environment_do_not_count(start: Callable[..., Terminal]) -> None:
    terminal = start(environment={"COLUMNS": "300", "LINES": "100"})
    terminal.say("Tell me a story")
    text = terminal.replies(1)
    assert text.count("Once upon a time") == 1
    assert "".join(REPLY.split()) in "".join(text.split())


def test_a_terminal_that_gets_narrow_leaves_no_panel(start: Callable[..., Terminal]) -> None:
    terminal = start("--delay", "0.15", columns=100)
    terminal.say("Tell me a story")
    terminal.see("faster")
    terminal.screen.resize(columns=20)
    terminal.child.setwinsize(30, 20)
    text = terminal.replies(1)
    assert text.count("tokens per step") == 1
    assert "━" not in text


def test_no_colour_is_honoured(start: Callable[..., Terminal]) -> None:
    terminal = start("--marks", no_color="1")
    terminal.say("Tell me a story")
    text = terminal.replies(1)
    assert "Once upon¹ a² time³ a small¹" in text
    cells = (terminal.screen.buffer[row][column] for row in range(30) for column in range(80))
    assert {cell.fg for cell in cells} == {"default"}


def test_history_that_cannot_be_written_is_a_notice(start: Callable[..., Terminal]) -> None:
    terminal = start("--history", "/proc/nowhere/history")
    terminal.see("the prompt history is not saved")
    terminal.say("one")
    terminal.replies(1)
    terminal.send(UP)
    terminal.see(lambda text: text.count("› one") == 2)


def test_without_a_terminal_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UserError, match="needs a terminal; use --prompt TEXT or pipe text to it"):
        chat(lambda _: pytest.fail("loaded"), Start("m", tmp_path / "h"))


def test_the_package_imports_no_torch() -> None:
    code = "import sys, medusa_chat.terminal.chat.repl\n"
    code += "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
