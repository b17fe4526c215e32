"""Runs that are cut off, stopped or run out of disk: what is left is whole, and can resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from medusa_chat.cli import main
from medusa_chat.config import UserError
from medusa_chat.terminal.reports import training as training_view
from medusa_chat.training import outputs, trainer
from medusa_chat.training.checkpoints import checkpoints_of, is_complete
from medusa_chat.training.trainer import train
from tests.helpers.full_disk import full_disk
from tests.helpers.tiny_runs import do, log_of, products, tiny_run

if TYPE_CHECKING:
    from medusa_chat.events import TrainStep

# Dropout, accumulation and a new epoch behind the cut: all that a checkpoint has to bring back.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "medusa1": ("medusa1", {"accumulation": 2, "lm_heads": "own"}),
    "medusa2": ("medusa2", {"heads_first": 0.3, "lora_dropout": 0.3}),
    "medusa2, whole": (
        "medusa2",
        {"heads_first": 0.3, "lora_rank": 0, "backbone_learning_rate": 1e-2},
    ),
    "distilled": ("distilled", {"lambda_0": 0.5, "lora_dropout": 0.3}),
}


class PowerCutError(Exception):
    """The power fails."""


def complete(run: Path) -> list[str]:
    """Names of the complete checkpoints of a run, newest first."""
    return [path.name for path in checkpoints_of(run) if is_complete(path)]


def stop_at(last: int) -> Any:
    def progress(step: TrainStep) -> None:
        if step.step >= last:
            raise PowerCutError

    return progress


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_off_resumes_to_the_same_weights(kind: str, tmp_path: Path) -> None:
    name, changes = KINDS[kind]
    settings = changes | {"max_steps": 24, "save_steps": 5, "batch_size": 4}
    do(tiny_run(tmp_path, "whole", name, **settings))
    with pytest.raises(PowerCutError):  # two steps behind the checkpoint of step 15
        train(tiny_run(tmp_path, "cut", name, **settings), stop_at(18), lambda _: None)
    run = tmp_path / "cut" / "checkpoints"
    assert complete(run) == ["checkpoint-15", "checkpoint-10"]
    half = run / "checkpoint-20"  # as if the power had failed while one was written
    shutil.copytree(run / "checkpoint-15", half)
    (half / "checksums.json").unlink()
    (half / "trainer_state.json").write_text("{")
    assert not (products(tmp_path / "cut"))
    seen: list[tuple[int, bool]] = []
    run_again = tiny_run(tmp_path, "cut", name, **settings, resume=True)
    train(run_again, lambda step: seen.append((step.step, half.exists())), lambda _: None)
    assert seen[0] == (16, False)
    assert products(tmp_path / "cut") == products(tmp_path / "whole")
    assert [line["step"] for line in log_of(tmp_path / "cut")] == list(range(2, 25, 2))
    for ours, theirs in zip(log_of(tmp_path / "cut"), log_of(tmp_path / "whole"), strict=True):
        assert (
            ours["head_loss"] == theirs["head_loss"] or ours["step"] == 16
        )  # where the mean begins anew
        assert ours["learning_rates"] == theirs["learning_rates"]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-20", "checkpoint-24"]


def test_checkpoints_hold_only_trained_weights(tmp_path: Path) -> None:
    for out, name, changes in (
        ("1", "medusa1", {}),
        ("2", "medusa2", {}),
        ("3", "medusa2", {"lora_rank": 0}),
    ):
        do(tiny_run(tmp_path, out, name, **changes, max_steps=2))
        names = set(
            load_file(tmp_path / out / "checkpoints" / "checkpoint-2" / "model.safetensors")
        )
        assert {"heads.weight", "heads.bias"} <= names
        rest = names - {"heads.weight", "heads.bias"}
        assert all(n.startswith("backbone.") for n in rest)
        assert {
            "1": not rest,
            "2": bool(rest) and all("lora_" in n for n in rest),
            "3": len(rest) > 15,
        }[out]


def test_a_finished_run_resumes_to_what_it_is(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "out", "medusa2"))
    before, log = products(tmp_path / "out"), (tmp_path / "out" / "training.jsonl").read_text()
    (tmp_path / "out" / "model.safetensors").unlink()  # it was cut off while this was written
    do(tiny_run(tmp_path, "out", "medusa2", resume=True))
    assert products(tmp_path / "out") == before
    assert (tmp_path / "out" / "training.jsonl").read_text() == log


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "out"))
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"out holds a run already \(checkpoint-10\); --resume goes on"
    ):
        do(tiny_run(tmp_path, "out", heads=3))
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == files


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"heads": 3}, "had heads 2, not 3"),
        ({"learning_rate": 1e-3}, "had learning_rate 0.002, not 0.001"),
        ({"seed": 1}, "had seed 0, not 1"),
        ({"max_steps": 20}, "had max_steps 10, not 20"),
        ({"held_out": (Path("x"),)}, r"had held_out \[\], not \['x'\]"),
        ({"name": "medusa2"}, "had recipe 'medusa1', not 'medusa2'"),
        ({"heads_from": "x/y"}, "had heads_from None, not 'x/y'"),
    ],
    ids=str,
)
def test_a_run_with_other_settings_is_not_resumed(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    tiny_run(tmp_path, "out")
    (tmp_path / "out").mkdir()
    settings = json.dumps(tiny_run(tmp_path, "out").settings())
    (tmp_path / "out" / "training.json").write_text(settings)
    with pytest.raises(UserError, match=complaint + ".*--resume needs the same settings"):
        do(tiny_run(tmp_path, "out", **changes, resume=True))
    assert (tmp_path / "out" / "training.json").read_text() == settings


def test_a_run_of_an_older_version_had_the_defaults_of_newer_settings(tmp_path: Path) -> None:
    tiny_run(tmp_path, "out")
    (tmp_path / "out").mkdir()
    settings = tiny_run(tmp_path, "out").settings()
    del settings["loss"]
    (tmp_path / "out" / "training.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="had loss 'ce', not 'kl'"):
        do(tiny_run(tmp_path, "out", loss="kl", resume=True))
    do(tiny_run(tmp_path, "out", resume=True))
    assert products(tmp_path / "out")


def test_there_has_to_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"there is no run to resume in .*out: training\.json is missing or damaged"
    ):
        do(tiny_run(tmp_path, "out", resume=True))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text('{"model": ')
    with pytest.raises(UserError, match="missing or damaged"):
        do(tiny_run(tmp_path, "out", resume=True))


def test_a_run_cut_off_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    with pytest.raises(PowerCutError):
        train(tiny_run(tmp_path, "cut"), stop_at(2), lambda _: None)
    steps, _ = do(tiny_run(tmp_path, "cut", resume=True))
    assert (
        [step.step for step in steps]
        == [line["step"] for line in log_of(tmp_path / "cut")]
        == [2, 4, 6, 8, 10]
    )
    do(tiny_run(tmp_path, "whole"))
    assert products(tmp_path / "cut") == products(tmp_path / "whole")


# ---- Ctrl-C ----


def words(tmp_path: Path, out: str, *more: str) -> list[str]:
    """A run on the command line, the same as tiny_run makes with these settings."""
    tiny_run(tmp_path, out)  # for its files
    flags = "--heads 2 --max-steps 10 --length 32 --batch-size 2 --warmup-steps 2"
    flags += " --save-steps 4 --logging-steps 2"
    given = [
        "--model",
        str(tmp_path / "backbone"),
        "--data",
        str(tmp_path / "talks.jsonl"),
        *flags.split(),
        *more,
    ]
    return ["train", *given, "--lora-rank", "2", "--out", str(tmp_path / out)]


def test_ctrl_c_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []

    def interrupt(step: TrainStep) -> None:
        if step.step == 6:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="stopped at step 7 of 10; --resume goes on from there"):
        train(tiny_run(tmp_path, "out", "medusa2"), interrupt, said.append)
    assert said[-1] == "stopping after this step; Ctrl-C again stops at once"
    assert signal.getsignal(signal.SIGINT) is handler
    assert complete(tmp_path / "out" / "checkpoints")[0] == "checkpoint-7"
    do(tiny_run(tmp_path, "out", "medusa2", resume=True))
    do(tiny_run(tmp_path, "whole", "medusa2"))
    assert products(tmp_path / "out") == products(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt(_: TrainStep) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(tmp_path, "out"), interrupt, lambda _: None)
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    """A real process and a real signal."""
    many = ["--max-steps", "100000", "--save-steps", "50000"]
    command = [sys.executable, "-m", "medusa_chat.cli", *words(tmp_path, "out", *many)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    assert process.stdout is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    lines += process.stderr.readlines()
    assert process.wait(60) == 2
    assert process.stdout.read() == ""
    assert "tokens in" in lines[0]  # nothing comes before it: no library's warning
    last = re.fullmatch(
        r"medusa-chat: error: stopped at step (\d+) of 100000; --resume goes on from there\n",
        lines[-1],
    )
    assert last, lines[-3:]
    assert all(line.startswith(("step ", "stopping after")) for line in lines[1:-1])
    assert complete(tmp_path / "out" / "checkpoints") == [f"checkpoint-{last[1]}"]
    assert products(tmp_path / "out") == {}


# ---- a full disk ----


def assert_resumed_whole(asked: list[str], place: Path) -> None:
    """The run of `asked`, once resumed, leaves what an unbroken one does."""
    assert main([*asked, "--resume"]) == 0
    do(tiny_run(place, "whole", "medusa2"))
    assert products(place / "out") == products(place / "whole")


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 6 on no file may exceed four kilobytes, so the checkpoint of step 8 fails."""
    plain = training_view.training_line
    asked = words(tmp_path, "out", "--recipe", "medusa2")
    with full_disk() as limit:

        def fill(step: TrainStep) -> str:
            if step.step == 6:
                limit(4096)
            return plain(step)

        monkeypatch.setattr(training_view, "training_line", fill)
        assert main(asked) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    run = tmp_path / "out" / "checkpoints"
    assert last.startswith(f"medusa-chat: error: cannot write to {run}: ")
    assert last.endswith(f"; {run}/checkpoint-4 is whole, and --resume goes on from it")
    assert (run / "checkpoint-8").exists()
    monkeypatch.undo()
    assert_resumed_whole(asked, tmp_path)


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = outputs.save_backbone
    asked = words(tmp_path, "out", "--recipe", "medusa2")
    with full_disk() as limit:

        def fill(*arguments: Any) -> None:
            limit(4096)
            save(*arguments)

        monkeypatch.setattr(trainer, "save_backbone", fill)
        assert main(asked) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("checkpoint-10 is whole, and --resume goes on from it")
    monkeypatch.undo()
    assert_resumed_whole(asked, tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a file, and no folder")
    for out in ("file", "file/out"):
        asked = words(tmp_path, "elsewhere")[:-1]
        assert main([*asked, str(tmp_path / out)]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"medusa-chat: error: {tmp_path}/file")
        assert told.count("\n") == 1
