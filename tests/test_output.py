"""Text of files, hubs, servers and exceptions reaches the terminal as text, in every encoding."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

import medusa_chat
from medusa_chat.cli import main
from medusa_chat.config import LoadOptions, ModelSpec
from medusa_chat.model.loading import load_model
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.chat.command import Chat
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.output import SafeConsole, say, warn
from medusa_chat.text import LONGEST_LINE, one_line, reason_of, sanitize
from tests.helpers.complaints import complaint, refusal
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tiny import random_model, save_model

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(medusa_chat.__file__).parent
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x1b[31mred\u202e[bold]x[/bold]"
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Scripts that print figures of their own making.
SCRIPTS = {"training/bundled.py", "bench/random_model.py", "native/build.py"}


@given(st.text() | st.text("\x1b[]0;\x07\x9b2Jm\\P"))
def test_safe_text_has_no_controls(text: str) -> None:
    assert not CONTROLS.search(sanitize(text))
    line = one_line(text)
    assert "\n" not in line
    assert len(line) <= LONGEST_LINE


@pytest.mark.parametrize("wrap", [str, Text, Panel, lambda text: grid(text)])
def test_a_console_prints_data_as_data(wrap: Callable[[str], object]) -> None:
    file = io.StringIO()
    SafeConsole(file=file, width=60).print(wrap(HOSTILE))
    printed = file.getvalue()
    assert not CONTROLS.search(printed)
    assert "[bold]x[/bold]" in printed


def grid(text: str) -> Table:
    table = Table(text, title=text)
    table.add_row(text)
    return table


def test_colours_of_our_own_stay() -> None:
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard").print(Text("x", "red"))
    assert "\x1b[31mx" in file.getvalue()


def test_there_is_one_way_out() -> None:
    """No module but the owner prints, or makes a console."""
    found = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "Console")
    }
    assert found == {"terminal/output.py"} | SCRIPTS


def test_a_loaded_conversation_cannot_steer_the_terminal(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    chat = Chat(Session(FakeEngine(), Sampling()), False)
    dispatch(chat, f"/save {saved}")
    document = json.loads(saved.read_text())
    document["model"] = HOSTILE
    saved.write_text(json.dumps(document))
    file = io.StringIO()
    SafeConsole(file=file).print(dispatch(chat, f"/load {saved}"))
    assert "saved with" in file.getvalue()
    assert not CONTROLS.search(file.getvalue())


def test_values_of_a_config_in_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model", random_model(vocabulary=260))
    config = json.loads((folder / "config.json").read_text())
    for change in ({"model_type": HOSTILE}, {"attention_bias": HOSTILE * 99}):
        (folder / "config.json").write_text(json.dumps(config | change))
        line = complaint(capsys, "--model", folder, "--prompt", "hi").rstrip("\n")
        assert not CONTROLS.search(line)
        assert len(line) < 600


def test_names_of_surplus_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model", random_model(vocabulary=260))
    tensors = load_file(folder / "model.safetensors") | {HOSTILE: torch.ones(1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = ("--model", folder, "--prompt", "hi", "--mode", "vanilla", "--max-new-tokens", "2")
    assert main([str(word) for word in words]) == 0
    notice = capsys.readouterr().err
    assert "has no place for" in notice
    assert not CONTROLS.search(notice)


def test_the_table_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"backbone": "a/b", "description": HOSTILE, "licence": HOSTILE}
    (tmp_path / "models.yaml").write_text(json.dumps({"models": {HOSTILE: entry}}))
    assert main(["models", "--models", str(tmp_path / "models.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "red" in printed
    assert not CONTROLS.search(printed)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, place: str) -> None:
    folder = save_model(tmp_path / "model", random_model(vocabulary=260))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refusal(load_model, ModelSpec("m", str(folder)), LoadOptions(device="cpu"))
    assert f"{place!r} is no file of its folder" in line


def test_a_password_in_an_address_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_chat.training.server.PAUSES", ())
    (tmp_path / "p.txt").write_text("hi")
    for url in ("http://me:s3cret@127.0.0.1:9", "gopher://me:s3cret@there", "http://me:s3cret@"):
        words = ("distill", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o")
        line = complaint(capsys, *words, "--server", url)
        assert "s3cret" not in line
        assert "--server" in line or "127.0.0.1:9" in line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_encoding_takes_the_output(encoding: str, tmp_path: Path) -> None:
    entry = {"backbone": "a/b", "description": "naïve 漢字 \ud83d"}
    (tmp_path / "models.yaml").write_text(json.dumps({"models": {"ü漢": entry}}))
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for words in (["models"], ["--model", "漢", "--prompt", "x"]):
        command = [sys.executable, "-m", "medusa_chat.cli", *words]
        command += ["--models", str(tmp_path / "models.yaml")]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
        assert done.returncode == (0 if words == ["models"] else 2)
        assert b"Traceback" not in done.stderr
        text = (done.stdout + done.stderr).decode(encoding)
        assert ("naïve" in text or words != ["models"]) or encoding == "ascii"


def test_reasons_of_nested_errors() -> None:
    announced = ValueError("Validation error for field 'attention_bias':\n    TypeError: got str")
    assert reason_of(announced) == "Validation error for field 'attention_bias': TypeError: got str"
    error = RuntimeError("cannot load")
    error.__cause__ = KeyError("weight")
    assert reason_of(error) == "cannot load: KeyError 'weight'"
    assert reason_of(ValueError()) == "ValueError"


def test_lines_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"wrote {HOSTILE}")
    warn("first\nsecond")
    printed = capsys.readouterr()
    assert not CONTROLS.search(printed.out)
    assert printed.err == "medusa-chat: first second\n"
