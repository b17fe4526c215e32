"""From prompts to a faster chat on the command line; a mistake is one line and status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.cli import main
from medusa_chat.config import ACCURACY_FILE
from medusa_chat.model.layouts import OWN_HEADS
from tests.helpers.complaints import complaint
from tests.helpers.tiny_runs import backbone_folder, do, log_of, products, tiny_run, write_talks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def asked(tmp_path: Path) -> list[Any]:
    """`train` on a tiny model."""
    folder, data = backbone_folder(tmp_path / "backbone"), write_talks(tmp_path / "talks.jsonl")
    flags = "--heads 2 --max-steps 4 --length 32 --batch-size 2 --logging-steps 2 --lora-rank 2"
    return ["train", "--model", folder, "--out", tmp_path / "out", *flags.split(), "--data", data]


def test_mistakes_are_one_line(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no run to resume" in complaint(capsys, *asked, "--resume")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"text": "fine"}\n{"text": "cut o\n')
    assert f"{damaged}, line 2: not JSON" in complaint(capsys, *asked, damaged)
    assert "cannot read" in complaint(capsys, *asked, tmp_path / "absent.jsonl")
    assert "there are medusa1, medusa2, distilled" in complaint(
        capsys, *asked, "--recipe", "medusa3"
    )
    assert "heads must be above 0" in complaint(capsys, *asked, "--heads", 0)
    assert "epochs must be a number" in complaint(capsys, *asked, "--epochs", "many")
    assert "unknown model" in complaint(capsys, *asked, "--model", "nothing")
    assert "no such file or folder" in complaint(capsys, *asked, "--heads-from", "./nowhere")
    assert "would overwrite" in complaint(
        capsys, *asked, "--recipe", "medusa2", "--out", tmp_path / "backbone"
    )
    assert not (tmp_path / "out" / OWN_HEADS).exists()


def test_damaged_data_are_reported_before_anything_is_written(
    asked: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from medusa_chat.training import trainer

    monkeypatch.setattr(trainer, "make_trainee", None)
    (tmp_path / "talks.jsonl").write_text("{}\n")
    assert "talks.jsonl, line 1: no 'messages'" in complaint(capsys, *asked)
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(
    asked: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trainer", "trainee", "export"):
        monkeypatch.delitem(sys.modules, f"medusa_chat.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert (
        complaint(capsys, *asked)
        == "medusa-chat: error: training needs peft: pip install 'medusa-chat[train]'\n"
    )


@pytest.mark.parametrize("recipe", ["medusa1", "distilled"])
def test_each_command_writes_what_the_next_one_needs(
    recipe: str, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, own, out = tmp_path / "prompts.txt", tmp_path / "own.jsonl", tmp_path / "out"
    prompts.write_text("".join(f"Say {number}\n" for number in range(12)))
    backbone = ["--model", str(tmp_path / "backbone")]
    assert (
        main(
            [
                "distill",
                *backbone,
                "--prompts",
                str(prompts),
                "--out",
                str(own),
                "--max-new-tokens",
                "12",
            ]
        )
        == 0
    )
    assert len(own.read_text().splitlines()) > 9
    assert main([str(word) for word in asked[:-1]] + [str(own), "--recipe", recipe]) == 0
    printed = capsys.readouterr()
    model = backbone if recipe == "medusa1" else ["--model", str(out)]
    shared = [*model, "--heads", str(out)] if recipe == "medusa1" else model
    assert f"next: medusa-chat calibrate {' '.join(shared)} --data FILE" in printed.out
    assert "error" not in printed.err.lower()
    assert "warning" not in printed.err.lower()
    exact = [*shared, "--dtype", "float32"]
    limits = ["--prompts", str(prompts), "--limit", "3", "--max-new-tokens", "12"]
    assert main(["calibrate", *exact, "--data", *limits[1:]]) == 0
    assert (out / ACCURACY_FILE).exists()
    capsys.readouterr()
    assert (
        main(["bench", *exact, *limits, "--rounds", "1", "--modes", "greedy", "--tree", "chain-2"])
        == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"device", "model", "versions", "prompts", "modes", "peers"} <= set(result)
    assert result["modes"]["greedy"]["acceptance_length"] >= 1
    assert main(["verify", *exact, *limits]) == 0
    assert "greedy, auto" in capsys.readouterr().out
    replies = []
    for mode in ("greedy", "vanilla"):
        words = [
            "chat",
            *exact,
            "--prompt",
            "Say 3",
            "--json",
            "--mode",
            mode,
            "--temperature",
            "0",  # where vanilla does not sample
            "--max-new-tokens",
            "12",
        ]
        assert main(words) == 0
        *steps, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {step["type"] for step in steps} == {"step"}
        replies.append(summary["ids"])
    assert replies[0] == replies[1]


@pytest.mark.parametrize("recipe", ["medusa1", "medusa2"])
def test_a_model_without_a_template_takes_that_of_its_entry(
    recipe: str, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Distill, train, calibrate and chat with one of fastchat's templates."""
    (tmp_path / "backbone" / "chat_template.jinja").unlink()
    models, prompts, own = (
        tmp_path / "models.yaml",
        tmp_path / "prompts.txt",
        tmp_path / "own.jsonl",
    )
    models.write_text("models: {mine: {backbone: ./backbone, template: vicuna_v1.1}}")
    prompts.write_text("Say it\nAgain\n")
    assert "--template NAME" in complaint(capsys, *asked)
    assert "no chat template 'vicuna'; close are" in complaint(
        capsys, *asked, "--template", "vicuna"
    )
    mine = ["--model", "mine", "--models", str(models)]
    answer = [
        "distill",
        *mine,
        "--prompts",
        str(prompts),
        "--out",
        str(own),
        "--max-new-tokens",
        "12",
    ]
    assert main(answer) == 0
    words = [str(word) for word in (*asked, "--recipe", recipe, *mine)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "--template vicuna_v1.1" in printed
    shared = [*mine, "--heads", str(tmp_path / "out")]
    if recipe == "medusa2":
        shared = ["--model", str(tmp_path / "out"), "--template", "vicuna_v1.1"]
    assert main(["calibrate", *shared, "--data", str(prompts), "--max-new-tokens", "12"]) == 0
    assert main(["chat", *shared, "--prompt", "Hi", "--max-new-tokens", "4"]) == 0


def test_a_named_template_makes_another_run(
    asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(word) for word in asked]) == 0
    line = complaint(capsys, *asked, "--template", "vicuna_v1.1", "--resume")
    assert "had template None, not 'vicuna_v1.1'" in line


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["medusa1", "medusa2", "distilled"])
def test_two_processes_train_as_one_and_only_the_first_speaks(
    recipe: str, asked: list[Any], tmp_path: Path
) -> None:
    """Two processes on the CPU with one row each, as `accelerate launch` starts them for GPUs."""
    more = [
        "--recipe",
        recipe,
        "--batch-size",
        "1",
        "--max-steps",
        "8",
        "--save-steps",
        "4",
        "--warmup-steps",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    words = [str(word) for word in (*asked, *more)]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command += ["-m", "medusa_chat.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert done.stderr.count("tokens in") == 1
    assert [line["step"] for line in log_of(tmp_path / "out")] == [2, 4, 6, 8]
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    steps, _ = do(
        tiny_run(tmp_path, "alone", recipe, max_steps=8, logging_steps=2)
    )  # a batch of two rows
    for line, step in zip(log_of(tmp_path / "out"), steps, strict=True):
        assert line["learning_rates"] == pytest.approx(step.learning_rates, rel=1e-4)
        assert line["loss"] == pytest.approx(step.loss, rel=0.05)
    assert products(tmp_path / "out").keys() == products(tmp_path / "alone").keys()
    settings = json.loads((tmp_path / "out" / "training.json").read_text())
    assert ("perplexity" in settings) is (recipe != "medusa1")
