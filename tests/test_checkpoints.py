"""What a run has done is kept: after signals, damage, other data, a second run, its end."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medusa_chat.config import UserError
from medusa_chat.locks import only_writer
from medusa_chat.settings import Duration
from medusa_chat.training.checkpoints import begin, checkpoints_of, is_complete
from medusa_chat.training.trainer import train
from tests.helpers.complaints import refusal
from tests.helpers.tiny_runs import do, products, tiny_run, write_talks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from medusa_chat.events import TrainStep

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with checkpoints of steps 8 and 11."""
    place = tmp_path_factory.mktemp("done")
    do(tiny_run(place, "out", "medusa2", max_steps=11))
    return place


@pytest.fixture
def place(done: Path) -> Iterator[Path]:
    """It, and what a test changes of its checkpoints is undone."""
    shutil.copytree(done / "out", done / "kept")
    yield done
    shutil.rmtree(done / "out")
    (done / "kept").rename(done / "out")


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    def interrupt(step: TrainStep) -> None:
        if step.step == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)  # some programs send it twice
        raise OSError("the terminal is gone")

    def say(line: str) -> None:
        if line.startswith("stopping"):
            raise OSError("the terminal is gone")

    handler = signal.getsignal(number)
    run = tiny_run(tmp_path, "out")
    with pytest.raises(UserError, match="stopped at step 3 of 10; --resume goes on from there"):
        train(run, interrupt, say)
    assert signal.getsignal(number) is handler
    assert names_in(run.out / "checkpoints") == ["checkpoint-3"]


def test_checkpoints_by_time(tmp_path: Path) -> None:
    often = Duration(1e-9)
    do(tiny_run(tmp_path, "often", save_every=often, save_steps=1000, max_steps=5))
    assert names_in(tmp_path / "often" / "checkpoints") == ["checkpoint-4", "checkpoint-5"]
    do(tiny_run(tmp_path, "never", save_every=Duration(0), save_steps=1000, max_steps=5))
    assert names_in(tmp_path / "never" / "checkpoints") == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("10m", 600, "10m"),
        ("90s", 90, "90s"),
        ("2h", 7200, "2h"),
        ("45", 45, "45s"),
        ("0", 0, "0s"),
    ],
)
def test_durations(text: str, seconds: float, shown: str) -> None:
    assert Duration.read("save_every", text) == seconds
    assert str(Duration.read("save_every", text)) == shown


@pytest.mark.parametrize("text", ["", "m", "ten", "-5m", "nan", "inf", "1d"])
def test_what_is_no_duration(text: str) -> None:
    assert refusal(Duration.read, "save_every", text).startswith("save_every must be a time such")


def test_a_finished_run_keeps_its_weights(place: Path) -> None:
    """The last step ends no epoch, where Trainer alone would take one more."""
    (place / "out" / "head_accuracy.json").write_text("measured with these heads")
    before = products(place / "out")
    do(tiny_run(place, "out", "medusa2", max_steps=11, resume=True))
    assert products(place / "out") == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, cut_short, flip], ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_passed_over(
    place: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = place / "out" / "checkpoints"
    damage(run / "checkpoint-11" / name)
    fault = "missing" if damage is Path.unlink else "damaged"
    lines: list[str] = []
    found = begin(place / "out", {}, resume=True, say=lines.append)
    assert found == run / "checkpoint-8"
    assert lines == [f"checkpoint-11 is damaged ({name} is {fault}): going on from checkpoint-8"]
    assert names_in(run) == ["checkpoint-8"]


def test_a_checkpoint_without_checksums_is_whole(place: Path) -> None:
    """As older versions wrote them."""
    newest = place / "out" / "checkpoints" / "checkpoint-11"
    (newest / "checksums.json").unlink()
    assert begin(place / "out", {}, resume=True) == newest


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_weights(place: Path) -> None:
    before = products(place / "out")
    flip(place / "out" / "checkpoints" / "checkpoint-11" / "optimizer.pt")
    _, lines = do(tiny_run(place, "out", "medusa2", max_steps=11, resume=True))
    assert "going on from checkpoint-8" in lines[0]
    assert products(place / "out") == before


def test_without_a_whole_checkpoint_nothing_is_touched(place: Path) -> None:
    run = place / "out" / "checkpoints"
    for path in checkpoints_of(run):
        flip(path / "model.safetensors")
    line = refusal(begin, place / "out", {}, resume=True)
    assert "checkpoint-11 is damaged (model.safetensors is damaged); checkpoint-8 is" in line
    assert [is_complete(path) for path in checkpoints_of(run)] == [True, True]


def test_other_data_of_the_same_name(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "out", resume=True)
    run.out.mkdir()
    (run.out / "training.json").write_text(json.dumps(run.settings()))
    write_talks(tmp_path / "talks.jsonl", seed=1)
    line = refusal(do, run)
    assert line.startswith(f"{tmp_path / 'talks.jsonl'} has changed since the run in {run.out}")


def test_a_second_run_into_the_same_folder(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "out")
    with only_writer(tmp_path / "out", "another run"):
        line = refusal(do, run)
    assert line.startswith(f"another run is writing to {tmp_path / 'out'}; wait until it ends")
    assert not (tmp_path / "out").exists()
    with only_writer(tmp_path / "out", "another run"):
        pass
    assert ".out.lock" not in names_in(tmp_path)


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "model.safetensors"])
def test_a_folder_with_a_model_is_not_trained_into(name: str, tmp_path: Path) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir()
    file.write_bytes(b"weights")
    (tmp_path / "out" / "head_accuracy.json").write_text("{}")
    line = refusal(do, tiny_run(tmp_path, "out"))
    assert f"holds a model or heads already ({name})" in line
    assert names_in(tmp_path / "out") == ["head_accuracy.json", name]
