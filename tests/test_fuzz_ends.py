"""Commands that are cut off at random moments, or have no memory or disk: nothing is lost.

FUZZ_CASES sets how many moments are tried.
"""

from __future__ import annotations

import random
import shutil
import signal
from typing import TYPE_CHECKING

import pytest

from tests.helpers import forked, nasty
from tests.helpers.tiny import save_with_heads
from tests.helpers.tiny_runs import products, tiny_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
# After Ctrl-C a command ends with 130; the other signals end one that has nothing to keep.
STATUSES = {0, 130, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGKILL}
MEBIBYTES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_heads(tmp_path_factory.mktemp("model"))


def question(folder: Path) -> list[str]:
    flags = ["--engine", "torch", "--dtype", "float32", "--tree", "chain-2", "--ignore-eos"]
    long = "Tell me more. " * 20
    return ["chat", "--model", str(folder), "--prompt", long, "--max-new-tokens", "100", *flags]


def test_signals_while_a_reply_is_loaded_for_prefilled_and_streamed(folder: Path) -> None:
    whole = forked.run(question(folder))
    assert whole.status == 0, whole.stderr
    for seed in range(nasty.CASES):
        chance = random.Random(seed)
        moment = chance.random() * whole.seconds
        ended = forked.run(question(folder), chance.choice(SIGNALS), moment)
        assert ended.status in STATUSES, (seed, ended)
        assert "Traceback" not in ended.stderr, (seed, ended)
        assert whole.stdout.startswith(ended.stdout.removesuffix("\n")), (seed, ended)


def training(place: Path, out: str, *more: str) -> list[str]:
    tiny_run(place, out)  # for its files
    given = ["--model", str(place / "backbone"), "--data", str(place / "talks.jsonl")]
    flags = "--heads 2 --max-steps 24 --length 32 --batch-size 2 --save-steps 6 --lora-rank 2"
    return [
        "train",
        *given,
        *flags.split(),
        "--recipe",
        "medusa2",
        "--out",
        str(place / out),
        *more,
    ]


def test_signals_while_a_run_trains(tmp_path: Path) -> None:
    """Whatever the moment, the run resumes to the weights of one that was not cut off."""
    whole = forked.run(training(tmp_path, "whole"))
    assert whole.status == 0, whole.stderr
    for seed in range(nasty.CASES):
        chance = random.Random(seed)
        moment = chance.random() * whole.seconds
        ended = forked.run(training(tmp_path, "out"), chance.choice(SIGNALS), moment)
        assert ended.status in STATUSES | {2}, (seed, ended)
        assert "Traceback" not in ended.stderr, (seed, ended)
        again = ["--resume"] if (tmp_path / "out" / "training.json").exists() else []
        rest = forked.run(training(tmp_path, "out", *again))
        assert rest.status == 0, (seed, ended, rest)
        assert products(tmp_path / "out") == products(tmp_path / "whole"), (seed, ended)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("command", ["chat", "train"])
def test_too_little_memory(command: str, folder: Path, tmp_path: Path) -> None:
    for size in MEBIBYTES:
        words = question(folder) if command == "chat" else training(tmp_path, "out")
        ended = forked.run(words, memory=size << 20)
        assert ended.status in (0, 2), (size, ended)
        assert "Traceback" not in ended.stderr, (size, ended)
        if ended.status:
            assert nasty.one_line(ended.stderr.splitlines()[-1]), (size, ended)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_output_on_a_full_disk(folder: Path) -> None:
    for words in (["models"], ["models", "--json"], ["--help"], question(folder)):
        for more in ([], ["--json"]) if words[0] == "chat" else ([],):
            ended = forked.run([*words, *more], stdout="/dev/full")
            assert ended.status == 2, (words[:2], ended)
            assert ended.stderr.count("\n") == 1, (words[:2], ended)
            assert "No space left" in ended.stderr, (words[:2], ended)
