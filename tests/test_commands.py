"""The slash-commands: dispatch, help and completion read one registry."""

from __future__ import annotations

import io
import os
import re
from base64 import b64decode
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

from medusa_chat.config import UserError
from medusa_chat.events import COPIED, Candidates, Step, Token
from medusa_chat.sampling import MODES, Sampling
from medusa_chat.settings import help_of
from medusa_chat.stats import Stats
from medusa_chat.terminal import tree_view
from medusa_chat.terminal.chat.command import REGISTRY, Chat, Stream, find, is_command
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.commands.talk import GREEDY_REPEATS
from medusa_chat.terminal.chat.completion import CommandCompleter
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.reports import tables
from tests.helpers.fake_engine import REPLY, FakeEngine, script

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def chat() -> Chat:
    return Chat(Session(FakeEngine(), Sampling()))


def printed(renderable: object) -> str:
    file = io.StringIO()
    Console(file=file, width=100, color_system=None).print(renderable)
    return file.getvalue()


def run(chat: Chat, line: str) -> str:
    return printed(dispatch(chat, line))


def row(table: str, label: str) -> list[str]:
    """Return the cells of the row that begins with `label` in a printed table."""
    lines = table.splitlines()
    found = next(line for line in lines if line.strip().startswith(label))
    return found.replace(label, "", 1).split()


def test_help_shows_every_command_its_usage_and_the_legend(chat: Chat) -> None:
    shown = run(chat, "/help")
    groups = [shown.index(f"{name}\n") for name in ("Talk", "Keep", "Look", "Decode")]
    assert groups == sorted(groups)
    assert shown.count("for example: /") == 4
    assert "Also /clear, /new." in shown
    for entry in REGISTRY.values():
        assert entry.help
        assert any(line.startswith(entry.invocation) for line in shown.splitlines())
        assert entry.help.split()[0] in shown
    assert "■ the model" in shown


@pytest.mark.parametrize("mode", MODES)
def test_modes(chat: Chat, mode: str) -> None:
    assert run(chat, f"/{mode}").startswith(mode)
    assert chat.session.sampling.mode == mode
    chat.session.sampling = Sampling()
    run(chat, f"/mode {mode}")
    assert chat.session.sampling.mode == mode
    assert run(chat, "/mode").startswith(mode)


def test_typical_takes_its_thresholds(chat: Chat) -> None:
    assert "epsilon 0.2 · delta 0.5" in run(chat, "/typical 0.2 0.5")
    assert (chat.session.sampling.epsilon, chat.session.sampling.delta) == (0.2, 0.5)
    run(chat, "/greedy")
    run(chat, "/typical")
    assert chat.session.sampling.epsilon == 0.2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/typical 0.2", r"usage: /typical \[EPSILON DELTA\]"),
        ("/typical 0.2 hot", "delta must be a number"),
        ("/typical 2 1", "epsilon must be"),
        ("/mode wild", "mode must be one of"),
        ("/set heat 1", "no setting 'heat'"),
        ("/set temperature -1", "temperature must be 0 or more"),
        ("/marks maybe", r"usage: /marks \[on\|off\]"),
        ("/save", "usage: /save FILE"),
        ("/load", "usage: /load FILE"),
        ("/load /nowhere/at/all", "/nowhere/at/all"),
        ("/greedy now", "/greedy takes no argument"),
        ("/tree oak", "no tree 'oak'"),
        ("/undo", "nothing to take back"),
        ("/regen", "no reply"),
        ("/tipical", "unknown command /tipical: did you mean /typical?"),
        ("/qit", "did you mean /quit?"),
        ("/rest", "unknown command /rest: "),
        ("/clea", "unknown command /clea: /help lists all"),
        ("/view sideways", r"usage: /view \[heads|markdown|both\]"),
        ("/edit", "no message to edit"),
        ("/continue", "no reply to continue"),
        ("/replies", "no reply to choose"),
        ("/replies two", r"usage: /replies \[N\]"),
        ("/copy", "no reply to copy"),
        ("/", "unknown command /: /help lists all"),
        ("/etc/hosts is what?", "// sends a message"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(chat: Chat, line: str, complaint: str) -> None:
    with pytest.raises(UserError, match=re.sub(r"([?|])", r"\\\1", complaint)) as caught:
        dispatch(chat, line)
    assert "\n" not in str(caught.value)
    assert chat.session.sampling == Sampling()


def test_what_is_a_command() -> None:
    assert is_command("/help")
    assert not is_command("//help")
    assert not is_command("help")
    assert find("/quit").name == find("/exit  ").name == "exit"
    assert find("/clear").name == find("/new").name == "reset"
    assert find("/retry").name == "regen"
    assert find("/?").name == "help"


@pytest.mark.parametrize("name", ["rest", "rese", "und", "lod", "clea", "newe"])
def test_no_hint_would_lose_the_conversation(name: str) -> None:
    with pytest.raises(UserError) as caught:
        find(f"/{name}")
    for losing in ("/reset", "/undo", "/load", "/clear", "/new?"):
        assert losing not in str(caught.value)


def test_any_white_space_ends_the_name_of_a_command(chat: Chat) -> None:
    run(chat, "/set temperature\t0.5")
    assert chat.session.sampling.temperature == 0.5
    run(chat, "/system\nBe brief.\tAlways.")
    assert chat.session.system == "Be brief.\tAlways."


def test_exit_leaves(chat: Chat) -> None:
    for line in ("/exit", "/quit", "/bye", "/q"):
        with pytest.raises(EOFError):
            dispatch(chat, line)


def test_set_shows_and_changes_every_setting(chat: Chat) -> None:
    shown = run(chat, "/set")
    for field in fields(Sampling):
        assert row(shown, field.name)[0] == tables.shown(field.default)
    assert set(help_of(Sampling)) == {field.name for field in fields(Sampling)}
    first = run(chat, "/set temperature 0.3").strip()
    assert (
        first == "temperature 0.3 · greedy mode does not use temperature; exact and typical mode do"
    )
    assert run(chat, "/set temperature 0.3").strip() == "temperature 0.3"
    assert run(chat, r"/set stop \n\nUser: x").strip() == r"stop '\n\nUser: x'"
    run(chat, "/set ignore_eos on")
    run(chat, "/set max_new_tokens 9")
    expected = Sampling(temperature=0.3, stop=("\n\nUser: x",), ignore_eos=True, max_new_tokens=9)
    assert chat.session.sampling == expected
    assert run(chat, "/set stop").strip() == "stop none"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seed", "seed is 0; change it with /set seed NUMBER"),
        ("temperature", "temperature is 0.7; change it with /set temperature NUMBER"),
        ("ignore_eos", "ignore_eos is off; change it with /set ignore_eos on|off"),
        ("mode", "mode is greedy; change it with /set mode greedy|typical|exact|vanilla"),
    ],
)
def test_set_without_a_value_shows_the_setting_and_how_to_change_it(
    chat: Chat, name: str, expected: str
) -> None:
    assert run(chat, f"/set {name}").strip() == expected
    assert chat.session.sampling == Sampling()


def test_system(chat: Chat) -> None:
    assert "helpful assistant" in run(chat, "/system")
    assert "Be [bold]brief." in run(chat, "/system Be [bold]brief.")
    assert chat.session.system == "Be [bold]brief."
    assert "none" in run(chat, '/system ""')
    assert chat.session.system == ""


def test_undo_reset_and_regen(chat: Chat) -> None:
    list(chat.session.ask("one\x1b[2J"))
    result = dispatch(chat, "/regen")
    assert isinstance(result, Stream)
    assert result.note == GREEDY_REPEATS
    list(result.steps)
    assert len(chat.session.messages) == 2
    run(chat, "/exact")
    result = dispatch(chat, "/regen")
    assert isinstance(result, Stream)
    assert result.note == "seed 1"
    shown = run(chat, "/undo")
    assert "took back: one" in shown
    assert "\x1b" not in shown
    list(chat.session.ask("two"))
    run(chat, "/reset")
    assert chat.session.messages == []


def test_stats_count_steps_while_heads_were_paused(chat: Chat) -> None:
    list(chat.session.ask("one"))
    assert "paused" not in run(chat, "/stats")
    for step in script(REPLY, paused_after=3):
        chat.session.conversation.add(step)
    paused = chat.session.conversation.paused_steps
    assert paused > 10
    assert row(run(chat, "/stats"), "steps while heads were paused") == ["0", str(paused)]


def test_stats_show_the_figures_of_both_stats(chat: Chat) -> None:
    list(chat.session.ask("one"))
    list(chat.session.ask("two"))
    last, conversation = chat.session.last, chat.session.conversation
    shown = run(chat, "/stats")
    assert row(shown, "new tokens") == [str(last.new_tokens), str(conversation.new_tokens)]
    assert row(shown, "steps") == [str(last.steps), str(conversation.steps)]
    for column, stats in enumerate((last, conversation)):
        vanilla = f"{stats.vanilla_tokens_per_second:.1f}"
        assert row(shown, "tokens/s")[column] == f"{stats.tokens_per_second:.1f}"
        assert row(shown, "vanilla tokens/s")[column] == vanilla
        assert row(shown, "acceptance length")[column] == f"{stats.acceptance_length:.2f}"
        assert row(shown, "step cost")[column] == f"{stats.overhead:.2f}x"
        assert row(shown, "speedup")[column] == f"{stats.speedup:.2f}x"
    assert row(shown, "comparisons") == [str(last.comparisons), str(conversation.comparisons)]
    for head, rate in last.head_acceptance().items():
        assert row(shown, f"accepted of head {head}")[0] == f"{rate:.1%}"
    assert row(shown, "prefill time")[:2] == ["0.250", "s"]


def test_stats_before_the_first_reply_are_dashes(chat: Chat) -> None:
    assert row(run(chat, "/stats"), "speedup") == ["–", "–"]


def test_stats_show_no_speedup_of_a_few_comparisons(chat: Chat) -> None:
    for step in list(script(REPLY))[:6]:
        chat.session.last.add(step)
    assert chat.session.last.comparisons == 2
    for name in ("vanilla tokens/s", "step cost", "speedup"):
        assert row(run(chat, "/stats"), name)[0] == "–"


def test_heads(chat: Chat) -> None:
    assert "no guess" in run(chat, "/heads")
    list(chat.session.ask("one"))
    stats = chat.session.conversation
    shown = run(chat, "/heads")
    for head, rate in stats.head_acceptance().items():
        cells = row(shown, f"■ head {head}")
        assert cells[2:5] == [str(stats.reached[head]), str(stats.accepted[head]), f"{rate:.1%}"]


def test_tree_is_drawn_with_the_accepted_path(chat: Chat) -> None:
    assert "no step has used it yet" in run(chat, "/tree")
    list(chat.session.ask("one"))
    shown = run(chat, "/tree").splitlines()
    assert shown[0].startswith("auto: 9 nodes")
    ticked = [line.strip("│├└─ \N{NO-BREAK SPACE}") for line in shown if "✓" in line]
    assert ticked == ["␣river ✓", "␣how ✓", "␣far ✓", "é ✓"]
    assert any("[red]" in line for line in shown)
    assert any(line.endswith(r"\n") for line in shown)
    assert run(chat, "/tree chain").startswith("chain:")


def test_a_large_tree_stays_readable() -> None:
    paths: list[tuple[int, ...]] = [(), *((rank,) for rank in range(10))]
    paths += [(first, rank) for first in range(6) for rank in range(6)]
    paths += [(0, first, rank) for first in range(4) for rank in range(4)]
    accepted = tuple(paths.index(path) for path in ((), (0,), (0, 5)))
    shown = printed(tree_view.draw(Candidates(tuple(paths), tuple(map(str, paths)), accepted)))
    lines = shown.splitlines()
    assert len(paths) == 63
    assert len(lines) < 24
    assert sum("✓" in line for line in lines) == 3
    hidden = sum(int(line.split("… ")[1].split()[0]) for line in lines if "more" in line)
    drawn = sum("(" in line for line in lines)
    assert drawn + hidden == 63


def test_copies(chat: Chat) -> None:
    assert "copied" in run(chat, "/help")
    assert run(chat, "/copies off").strip() == "copies off"
    trees = chat.session.engine.trees
    assert not trees.copies
    assert "copied" not in run(chat, "/help").split("■")[1]
    assert "■" in run(chat, "/copies")
    assert bool(trees.copies)
    with pytest.raises(UserError, match=r"usage: /copies \[on\|off\]"):
        dispatch(chat, "/copies maybe")


def test_copied_guesses_are_drawn_and_counted_as_such(chat: Chat) -> None:
    paths = ((), (0,), (COPIED,), (COPIED, COPIED))
    candidates = Candidates(paths, ("a", "b", "c", "d"), (0, 2, 3))
    file = io.StringIO()
    console = Console(width=60, file=file, force_terminal=True, color_system="truecolor")
    console.print(tree_view.draw(candidates))
    drawn = file.getvalue()
    teal = "38;2;0;135;154"
    assert drawn.count(teal) == 2
    assert drawn.count("✓") == 3
    tokens = (Token(1, "a", 0), Token(2, "b", COPIED))
    stats = Stats.of([Step(tokens, 8, 0.01, "tree", tested=(COPIED, COPIED, 1))])
    chat.session.conversation = chat.session.last = stats
    gauge = "━" * 10 + "╌" * 10
    expected = ["any", "token", "2", "1", "50.0%", gauge]
    assert row(run(chat, "/heads"), "■ copied") == expected
    assert row(run(chat, "/stats"), "accepted of copied") == ["50.0%", "50.0%"]


def test_raw(chat: Chat) -> None:
    assert "raw on: the model goes on with your text" in run(chat, "/raw on")
    assert chat.session.engine.raw
    assert "raw off: messages go through the chat template" in run(chat, "/raw")
    assert not chat.session.engine.raw


def test_marks(chat: Chat) -> None:
    assert "guessed 1 ahead¹" in run(chat, "/marks on")
    assert chat.marks
    run(chat, "/marks")
    assert not chat.marks


def test_view(chat: Chat) -> None:
    assert run(chat, "/view").startswith("both:")
    assert run(chat, "/view heads").startswith("heads:")
    assert chat.view == "heads"


def test_replies_are_listed_and_chosen(chat: Chat) -> None:
    chat.session.engine = FakeEngine(["first\n\nreply", "second " * 30])
    list(chat.session.ask("one"))
    list(chat.session.regen())
    first, second = run(chat, "/replies").splitlines()
    assert first == "  1  first reply"
    assert second.startswith("▸ 2  second second")
    assert second.endswith("…")
    assert run(chat, "/replies 1").startswith("▸ 1")
    assert chat.session.messages[-1]["content"] == "first\n\nreply"
    with pytest.raises(UserError, match="there are 2 replies"):
        dispatch(chat, "/replies 3")
    assert completions("/replies ", chat.session) == ["/replies 1", "/replies 2"]


CODE = "Look:\n\n```python\n\tprint(1)\n```\n1. then\n   ```\n   x\n   ```\n"


@pytest.mark.parametrize(
    ("line", "copied"),
    [
        ("/copy", CODE),
        ("/copy 1", "\tprint(1)\n"),
        ("/copy 2", "x\n"),
        ("/copy code", "x\n"),
    ],
)
def test_copy(chat: Chat, line: str, copied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.session.engine = FakeEngine([CODE])
    list(chat.session.ask("one"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    assert "OSC 52" in run(chat, line)
    sequence = re.fullmatch(r"\x1b\]52;c;([^\x07]*)\x07", out.getvalue())
    assert sequence
    assert b64decode(sequence[1]).decode() == copied


def test_copy_by_the_systems_tool(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(chat.session.ask("one"))
    tool = tmp_path / "xclip"
    tool.write_text(f'#!/bin/sh\ncat > "{tmp_path}/clipboard"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("SSH_TTY", raising=False)
    assert "(xclip)" in run(chat, "/copy")
    assert (tmp_path / "clipboard").read_text() == REPLY


def test_copy_to_a_private_file(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(chat.session.ask("one"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert "no clipboard here" in run(chat, "/copy")
    file = tmp_path / "medusa-chat" / "copied.txt"
    assert file.read_text() == REPLY
    assert file.stat().st_mode & 0o777 == 0o600


def test_copy_names_the_blocks_that_there_are(chat: Chat) -> None:
    list(chat.session.ask("one"))
    with pytest.raises(UserError, match="no block of code"):
        dispatch(chat, "/copy code")
    chat.session.engine = FakeEngine([CODE])
    list(chat.session.ask("two"))
    with pytest.raises(UserError, match="has 2 blocks of code"):
        dispatch(chat, "/copy 3")


def test_save_and_load(chat: Chat, tmp_path: Path) -> None:
    list(chat.session.ask("one"))
    path = tmp_path / "my talk.json"
    assert "saved 2 messages" in run(chat, f"/save {path}")
    run(chat, "/reset")
    assert "loaded 2 messages" in run(chat, f"/load {path}")
    assert chat.session.messages[1]["content"] == REPLY
    chat.session.engine.name = "other"
    loaded = run(chat, f"/load {path}").replace("\n", " ")
    assert "saved with fake, you now chat with other" in loaded


def completions(line: str, session: Session | None) -> list[str]:
    completer = CommandCompleter(lambda: session)
    found = completer.get_completions(Document(line), CompleteEvent())
    return [line[: len(line) + entry.start_position] + entry.text for entry in found]


def test_completion(chat: Chat, tmp_path: Path) -> None:
    session = chat.session
    assert completions("/", session) == [f"/{name}" for name in REGISTRY]
    assert sorted(completions("/s", None)) == ["/save", "/set", "/settings", "/stats", "/system"]
    assert completions("/view m", None) == ["/view markdown"]
    assert completions("/mode e", None) == ["/mode exact"]
    assert completions("/set mode v", session) == ["/set mode vanilla"]
    assert completions("/set top", None) == ["/set top_p", "/set top_k"]
    assert completions("/set loop_guard o", None) == ["/set loop_guard on", "/set loop_guard off"]
    assert completions("/set seed 1", None) == []
    assert completions("/marks of", None) == ["/marks off"]
    assert completions("/tree c", session) == ["/tree chain"]
    assert completions("/tree c", None) == []
    (tmp_path / "talk.json").touch()
    assert completions(f"/load {tmp_path}/ta", session) == [f"/load {tmp_path}/talk.json"]
    for nothing in ("hello", "//s", "/nothing x", "hello /s", "/s\n/s"):
        assert completions(nothing, session) == []


def test_names_of_files_that_are_not_utf8(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    list(chat.session.ask("hello"))
    assert "saved 2 messages to" in run(chat, "/save talk\udcff.json")
    assert "loaded 2 messages" in run(chat, "/load talk\udcff.json")
    assert os.listdir(b".") == [b"talk\xff.json"]
