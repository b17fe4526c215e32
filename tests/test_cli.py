"""The command line: the output that scripts read; every mistake is one line and status 2."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.cli import main
from medusa_chat.commands import COMMANDS
from medusa_chat.model.layouts import OWN_HEADS
from tests.helpers.complaints import complaint
from tests.helpers.tiny import save_with_heads

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_heads(tmp_path_factory.mktemp("model"))


def run(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medusa_chat.cli", *words]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def answer(folder: Path, *words: str) -> list[str]:
    return [
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--tree",
        "chain-2",
        "--max-new-tokens",
        "8",
        *words,
    ]


def test_json_lines_are_the_steps_and_a_summary(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(answer(folder, "--prompt", "Hi", "--json")) == 0
    *steps, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {step["type"] for step in steps} == {"step"}
    assert set(steps[0]) == {
        "type",
        "tokens",
        "nodes",
        "seconds",
        "kind",
        "depth",
        "finish",
        "tested",
        "paused",
    }
    assert set(steps[0]["tokens"][0]) == {"id", "text", "head"}
    tokens = [token for step in steps for token in step["tokens"]]
    assert summary["type"] == "summary"
    assert summary["ids"] == [token["id"] for token in tokens]
    assert summary["text"] == "".join(token["text"] for token in tokens)
    assert (summary["new_tokens"], summary["steps"]) == (8, len(steps))
    assert (summary["mode"], summary["finish"]) == ("greedy", "length")
    assert {
        "acceptance_length",
        "tokens_per_second",
        "vanilla_tokens_per_second",
        "speedup",
    } <= set(summary)


def test_modes_agree_and_piped_text_is_a_prompt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = []
    for mode in ("greedy", "vanilla", "typical", "exact"):
        assert (
            main(answer(folder, "--prompt", "Hi", "--json", "--mode", mode, "--temperature", "0"))
            == 0
        )
        replies.append(json.loads(capsys.readouterr().out.splitlines()[-1])["ids"])
    assert replies[0] == replies[1] == replies[2] == replies[3]
    piped = run(*answer(folder, "--json"), text="Hi\n")
    assert json.loads(piped.stdout.splitlines()[-1])["ids"] == replies[0]
    assert piped.stderr == ""


def test_piped_text_follows_the_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def summary(line: str) -> Any:
        return json.loads(line.splitlines()[-1])["ids"]

    both = run(*answer(folder, "--json", "--prompt", "Sum up:"), text="A text.\n")
    assert main(answer(folder, "--prompt", "Sum up:\n\nA text.", "--json")) == 0
    assert summary(both.stdout) == summary(capsys.readouterr().out)


def test_a_prompt_is_an_argument_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = []
    for words in (("--prompt", "Hi there"), ("Hi there",), ("Hi", "there")):
        assert main([*answer(folder, "--json"), *words]) == 0
        replies.append(json.loads(capsys.readouterr().out.splitlines()[-1])["ids"])
    assert replies[0] == replies[1] == replies[2]
    twice = complaint(capsys, "Hi", "--prompt", "Hello")
    assert "the prompt is given twice" in twice
    assert "did you mean models? --prompt modls asks" in complaint(capsys, "modls")


def test_only_a_conversation_overflows(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "verify", "race"):
        mistake = complaint(capsys, command, "--overflow", "stop")
        assert "unrecognized arguments: --overflow" in mistake
    mistake = complaint(capsys, "--overflow", "wrap", "hi")
    assert "overflow must be one of drop, stop" in mistake


def test_a_race_prints_both_replies(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "race.cast"
    assert main(["race", *answer(folder, "--record", str(record)), "Tell me"]) == 0
    shown = capsys.readouterr().out
    assert "without heads" in shown
    assert "the same text" in " ".join(shown.split())
    assert json.loads(record.read_text().splitlines()[0])["version"] == 2
    assert "recorded to FILE.svg or" in complaint(capsys, "race", "hi", "--record", "a.png")


def test_prompts_that_are_not_utf8_are_refused_before_the_load() -> None:
    model = ("--model", "nobody/nothing")
    command = [sys.executable, "-m", "medusa_chat.cli", *model]
    for words, piped, expected in (
        ([b"--prompt", b"caf\xe9"], b"", b"the prompt is not UTF-8 text"),
        ([b"--prompt", b"a", b"--system", b"\xff"], b"", b"--system is not UTF-8 text"),
        ([], b"one\ncaf\xe9", b"standard input, line 2: not UTF-8"),
        ([], b"x" * (17 << 20), b"standard input holds more than"),
    ):
        done = subprocess.run(
            [*command, *words], input=piped, capture_output=True, env=ENVIRONMENT, timeout=60
        )
        assert done.returncode == 2
        assert expected in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_closed_streams_end_in_no_traceback(folder: Path) -> None:
    words = " ".join(answer(folder, "--prompt", "Hi"))
    for closed, status in ((">&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 2)):
        command = f"exec {sys.executable} -m medusa_chat.cli {words} {closed}"
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
        )
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
        assert done.returncode == status, (closed, done.stderr)
    empty = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m medusa_chat.cli <&-"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert empty.stderr == "medusa-chat: error: the prompt is empty\n"


def test_a_user_without_a_home_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def homeless(_path: str) -> str:
        return "~"

    monkeypatch.setattr("os.path.expanduser", homeless)
    assert "set HOME to a folder" in complaint(capsys, "models")


@pytest.mark.parametrize("value", ["x", "", "1.5"])
def test_a_limit_of_the_hub_that_is_no_number_is_told(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", value)
    assert f"HF_HUB_ETAG_TIMEOUT must be a whole number of seconds, not {value!r}" in complaint(
        capsys, "models"
    )


def test_stop_system_and_seed_reach_the_engine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ids(*words: str) -> Any:
        assert main(answer(folder, "--prompt", "Hi", "--json", *words)) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    drawn = [
        ids("--mode", "exact", "--temperature", "1.5", "--seed", str(seed))["ids"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    plain = ids()
    assert ids("--system", "You are a bird.")["ids"] != plain["ids"]
    stop = plain["text"][2:4]
    assert ids("--stop", stop)["text"] == plain["text"][: plain["text"].index(stop)]


BAD = {
    "unknown model": (["--model", "nonesuch", "--prompt", "hi"], "unknown model 'nonesuch'"),
    "empty model": (["--model", "", "--prompt", "hi"], "--model is empty"),
    "empty heads": (["--heads", " ", "--prompt", "hi"], "--heads is empty"),
    "nobody's home": (["--model", "~nouser/x", "--prompt", "hi"], "unknown model '~nouser/x'"),
    "unknown flag": (["--prompt", "hi", "--colour"], "unrecognized arguments: --colour"),
    "temperature": (["--prompt", "hi", "--temperature", "-1"], "temperature must be 0 or more"),
    "not a number": (["--prompt", "hi", "--top-p", "much"], "top_p must be a number"),
    "mode": (
        ["--prompt", "hi", "--mode", "fast"],
        "mode must be one of greedy, typical, exact, vanilla",
    ),
    "context": (["--prompt", "hi", "--max-context", "x"], "--max-context must be a whole number"),
    "quant": (["--prompt", "hi", "--quant", "int3"], "quant must be one of auto, none, nf4"),
    "empty prompt": (["--prompt", ""], "the prompt is empty"),
    "a chat's file": (["--transcript", "x", "--prompt", "hi"], "leave --prompt and pipes out"),
    "a kept chat": (["--continue", "hi"], "leave --prompt and pipes out"),
    "no prompts": (
        ["bench", "--prompts", "/nonesuch/file"],
        "cannot read the prompts /nonesuch/file",
    ),
    "no data": (
        ["train", "--model", "bundled", "--out", "/tmp/x", "--data", "/nonesuch"],
        "cannot read /nonesuch",
    ),
    "no mode": (["bench", "--modes", "warp", "--prompts", "/nonesuch"], "mode must be one of"),
    "device": (
        ["--json", "--device", "tpu"],
        "device must be one of auto, cpu, cuda, mps, not 'tpu'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = BAD[case]
    assert expected in complaint(capsys, *words)


def test_damaged_files_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orphan = tmp_path / "tree.json"
    orphan.write_text("[[0], [1, 0]]")
    assert "node [1, 0] is an orphan" in complaint(
        capsys, *answer(folder, "--prompt", "hi", "--tree", str(orphan))
    )
    missing = str(tmp_path / "no.json")
    assert "unknown tree" in complaint(capsys, *answer(folder, "--prompt", "hi", "--tree", missing))
    heads = tmp_path / "heads.safetensors"
    heads.write_bytes((folder / OWN_HEADS).read_bytes()[:-100])
    assert "damaged" in complaint(capsys, *answer(folder, "--prompt", "hi", "--heads", str(heads)))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copytree(folder, damaged, dirs_exist_ok=True)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "cannot load the model" in complaint(capsys, *answer(damaged, "--prompt", "hi"))
    long = complaint(capsys, *answer(folder, "--prompt", "word " * 200))
    assert "the prompt has" in long
    assert "holds 512" in long


def test_a_closed_pipe_ends_without_an_error(folder: Path) -> None:
    words = answer(folder, "--prompt", "Hi", "--json", "--max-new-tokens", "400", "--ignore-eos")
    command = [sys.executable, "-m", "medusa_chat.cli", *words]
    chat = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert chat.stdout is not None
    assert chat.stderr is not None
    assert chat.stdout.read(1) == b"{"
    chat.stdout.close()
    assert chat.stderr.read() == b""
    assert chat.wait(60) == 0


def test_a_table_that_nobody_reads_ends_without_an_error() -> None:
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "medusa_chat.cli", "models"]
    done = subprocess.run(
        command, stdout=written, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120
    )
    os.close(written)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_and_the_model_list_need_no_torch() -> None:
    code = (
        "import sys; from medusa_chat.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    for words in (["--help"], ["bench", "--help"], ["train", "--help"], ["models"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
        )
        assert done.stderr.strip() == "[]", words
        assert done.stdout
    help_text = run("--help").stdout
    for command in COMMANDS:
        assert command in help_text


def test_a_pipe_of_too_much_is_refused_before_the_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("medusa_chat.commands.prompt.MOST_PIPED", 1000)
    monkeypatch.setattr("medusa_chat.load", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 1001)))
    assert "standard input holds more than the 1,000 bytes" in complaint(capsys, "chat")
