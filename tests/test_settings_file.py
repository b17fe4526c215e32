"""The settings file: what it may hold, who wins over it, what is saved in it."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medusa_chat.cli import main, make_parser
from medusa_chat.commands import open_chat as opening
from medusa_chat.config import ChatOptions, LoadOptions, Message, UserError
from medusa_chat.sampling import Sampling
from medusa_chat.settings import help_of, make
from medusa_chat.settings_file import known_keys, read_settings, write_settings
from medusa_chat.terminal.chat.archive import Archive
from medusa_chat.terminal.chat.command import Chat
from medusa_chat.terminal.chat.conversation import Conversation
from medusa_chat.terminal.chat.keeping import Keeper
from medusa_chat.terminal.chat.kept import Place
from medusa_chat.terminal.chat.session import Session
from tests.helpers.complaints import complaint
from tests.helpers.fake_engine import FakeEngine
from tests.test_commands import run

if TYPE_CHECKING:
    from medusa_chat.terminal.chat.start import Start


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("MEDUSA_CHAT_DATA", str(tmp_path / "data"))
    path = tmp_path / "medusa-chat" / "settings.toml"
    path.parent.mkdir()
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Start]:
    """Settings of each chat that the command line opens, in place of the chat."""
    starts: list[Start] = []

    def chat(_load: object, start: Start) -> int:
        starts.append(start)
        return 0

    monkeypatch.setattr(opening, "chat", chat)
    monkeypatch.setattr("medusa_chat.commands.chat.read_prompt", lambda *_: None)
    return starts


def test_every_flag_and_setting_is_a_key() -> None:
    keys = known_keys()
    for settings in (Sampling, LoadOptions, ChatOptions):
        helps = help_of(settings)
        named = {field.name for field in fields(settings) if field.name in helps}
        assert named <= {key.field for key in keys.values()}
    options = vars(make_parser().parse_args(["chat"]))
    apart = {"command", "completion", "message", "prompt", "json", "latest", "resume", "words"}
    assert {key.field for key in keys.values()} >= set(options) - apart


def test_the_file_is_read_and_flags_win(file: Path, opened: list[Start]) -> None:
    file.write_text(
        'mode = "typical"\ntemperature = 1\nstop = ["a", "b"]\nmax-context = 99\n'
        'view = "heads"\nmarks = true\nediting = "vi"\nignore_eos = true\nsystem = "Be brief."\n'
    )
    main([])
    start = opened.pop()
    usual = Sampling("typical", 1.0, stop=("a", "b"), ignore_eos=True, loop_guard="on")
    assert make(Sampling, start.given) == usual
    expected = ChatOptions(system="Be brief.", marks=True, view="heads", editing="vi")
    assert start.options == expected
    main(["--mode", "exact", "--no-marks", "--view", "both", "--no-ignore-eos", "--seed", "7"])
    start = opened.pop()
    changed = replace(usual, mode="exact", ignore_eos=False, seed=7)
    assert make(Sampling, start.given) == changed
    assert start.options == ChatOptions(system="Be brief.", editing="vi")
    assert read_settings(file)["context"] == 99


def test_a_model_of_the_file_gives_way_with_its_heads(file: Path, opened: list[Start]) -> None:
    file.write_text('model = "vicuna-7b"\nheads = "some/heads"\n')
    main([])
    assert opened[-1].keeper.place == Place("vicuna-7b", "some/heads")
    main(["--model", "bundled"])
    assert opened[-1].keeper.place == Place("bundled")


def test_a_resumed_chat_brings_its_own_settings(
    file: Path, opened: list[Start], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text('model = "vicuna-7b"\nmode = "typical"\ntemperature = 0.2\n')
    assert "no chat is kept yet" in complaint(capsys, "--continue")
    messages: list[Message] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]
    record = Conversation("bundled", "S", Sampling("exact", 0.9), messages, ((), ()))
    archive = Archive(file.parent.parent / "data" / "chats.db")
    archive.add(record, Place("bundled"), "fox")
    for words in (["--continue"], ["--resume", "fox"], ["--resume", "1"]):
        main(words)
        start = opened.pop()
        assert start.model == "bundled"
        assert start.resumed
        assert start.resumed.conversation == record
    main(["--continue", "--temperature", "0.4", "--system", "T", "--model", "vicuna-7b"])
    start = opened.pop()
    assert start.model == "vicuna-7b"
    assert start.resumed
    assert start.resumed.conversation.sampling == Sampling("exact", 0.4)
    assert start.resumed.conversation.system == "T"
    assert "no kept chat 'wolf'" in complaint(capsys, "--resume", "wolf")
    refused = complaint(capsys, "--continue", "--transcript", "x.json")
    assert "leave --resume out" in refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "temprature = 1",
            "no setting 'temprature'; did you mean temperature or template?",
        ),
        ("zzz = 1", "there is no setting 'zzz', see `medusa-chat --help`"),
        ("temperature = 'hot'", "temperature must be a number"),
        ("temperature = 1" + "0" * 400, "temperature must be a number"),
        ("temperature = nan", "temperature must be"),
        ("temperature = -1", "temperature must be 0 or more"),
        ("seed = 1.5", "seed must be a whole number"),
        ("seed = true", "seed must be a whole number"),
        ("marks = 'on'", "marks must be true or false"),
        ("mode = 'fast'", "mode must be one of greedy"),
        ("mode = []", "mode must be one of greedy"),
        ("stop = [1]", "stop must be text, or a list of texts"),
        ("models = 1", "models must be a path"),
        ("device = 'tpu'", "device must be one of"),
        ("[sampling]\nseed = 1", "there is no setting 'sampling'"),
        ("seed = ", "is not TOML"),
        ("a = [" * 3000, "settings.toml"),
        ("seed = 1\nseed = 2", "is not TOML"),
        ("seed = 1 # \udcff", "not UTF-8"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    file.write_bytes(text.encode(errors="surrogateescape"))
    line = complaint(capsys, "--prompt", "hi")
    assert expected in line
    assert str(file) in line


def test_settings_are_saved_without_touching_the_rest(file: Path) -> None:
    file.write_text('# mine\ndevice = "cpu"  # always\nseed = 3\n"top-k" = 5\n')
    chat = Chat(
        Session(FakeEngine(), Sampling(loop_guard="on")),
        keeper=Keeper(place=Place("oak", "leaves")),
    )
    chat.session.system = "half a pair \ud800"
    for line in ("/exact", "/set temperature 0.3", "/set top_k 7", "/set stop x", "/view heads"):
        run(chat, line)
    assert "temperature" not in run(chat, "/settings")
    shown = run(chat, "/settings save").replace("\n", "")
    for name in ("mode", "temperature", "top-k", "seed", "stop", "view", "model", "heads"):
        assert name in shown.split("(")[0]
    text = file.read_text()
    assert text.startswith('# mine\ndevice = "cpu"  # always\nseed = 0\n"top-k" = 7\n')
    expected = {"mode": "exact", "temperature": 0.3, "stop": ("x",), "seed": 0, "top_k": 7}
    expected |= {"view": "heads", "model": "oak", "heads": "leaves", "device": "cpu"}
    expected["system"] = "half a pair ?"
    assert read_settings(file) == expected
    assert "temperature = 0.3" in run(chat, "/settings")
    assert "nothing to save" in run(chat, "/settings save")
    chat.keeper.place = Place("ash")
    run(chat, "/settings save")
    assert tomllib.loads(file.read_text())["model"] == "ash"
    assert "heads" not in tomllib.loads(file.read_text())
    with pytest.raises(UserError, match="usage: /settings"):
        run(chat, "/settings load")


def test_defaults_of_the_model_are_not_saved(file: Path) -> None:
    engine = FakeEngine()
    engine.defaults = {"mode": "exact", "temperature": 0.6}
    chat = Chat(Session(engine, Sampling("exact", 0.7, loop_guard="on")))
    assert run(chat, "/settings save").split()[:2] == ["saved", "temperature"]
    assert read_settings(file) == {"temperature": 0.7}


def test_a_file_that_cannot_be_written_or_read_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_settings(Path("/proc/nowhere/settings.toml"), {"seed": 1})
    damaged = tmp_path / "settings.toml"
    damaged.write_text("seed = ")
    with pytest.raises(UserError, match="is not TOML"):
        write_settings(damaged, {"seed": 1})
    assert damaged.read_text() == "seed = "
    assert write_settings(tmp_path / "new" / "settings.toml", {"seed": 1}) == ["seed"]
    assert read_settings(tmp_path / "new" / "settings.toml") == {"seed": 1}
