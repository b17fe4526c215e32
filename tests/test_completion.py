"""The shells' completion of commands, flags and values."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from medusa_chat.cli import main
from medusa_chat.commands import COMMANDS
from medusa_chat.commands.completion import SHELLS
from tests.helpers.complaints import complaint

if TYPE_CHECKING:
    from pathlib import Path

TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$(complete -p medusa-chat | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${COMPREPLY[@]}"
"""


def script(capsys: pytest.CaptureFixture[str], shell: str) -> str:
    with pytest.raises(SystemExit) as ending:
        main(["--completion", shell])
    assert not ending.value.code
    return capsys.readouterr().out


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "completion.bash"
    file.write_text(script(capsys, "bash"))
    (tmp_path / "tale.json").touch()
    for words, expected in (
        (["be"], "bench"),
        (["--mod"], "--model --models --mode"),
        (["--mode", "t"], "typical"),
        (["chat", "--editing", "v"], "vi"),
        (["chat", "--no-ma"], "--no-marks"),
        (["bench", "--quant", "nf"], "nf4 nf4-double"),
        (["--transcript", f"{tmp_path}/ta"], f"{tmp_path}/tale.json"),
    ):
        command = ["bash", "-c", TRY, "bash", str(file), "medusa-chat", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected.split(), words


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_commands_flags_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    text = script(capsys, shell)
    for word in (*COMMANDS, "resume", "private", "typical", "nf4-double"):
        assert word in text
    if shutil.which(shell):
        file = tmp_path / shell
        file.write_text(text)
        subprocess.run([shell, "-n", str(file)], check=True)


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose from" in complaint(capsys, "--completion", "tcsh")
