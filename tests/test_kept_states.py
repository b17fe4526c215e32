"""Hidden states of a frozen backbone that are kept on the disk: made once, whole, and right."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.config import UserError, make_recipe
from medusa_chat.training import kept_states
from medusa_chat.training import trainer as module
from medusa_chat.training.data import PackedRows
from medusa_chat.training.kept_states import FOLDER, drop_states, keep_states
from medusa_chat.training.memory import kept_bytes
from medusa_chat.training.reference import LIKELIEST
from medusa_chat.training.trainee import Trainee
from medusa_chat.training.trainer import train
from tests.helpers.full_disk import full_disk
from tests.helpers.tiny import random_model
from tests.helpers.tiny_runs import do, products, tiny_run
from tests.test_losses import DOCUMENTS

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.events import TrainStep

LENGTH = 16


class PowerCutError(Exception):
    """The power fails."""


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    monkeypatch.setattr(module, "choose_dtype", lambda *_: found)
    return found


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each forward of a backbone: `training`, or `keeping` before it."""
    seen: list[str] = []
    own, before = Trainee.hidden_states, kept_states.keep_states

    def training(*arguments: Any) -> Any:
        seen.append("training")
        return own(*arguments)

    def keeping(backbone: Any, *arguments: Any) -> Any:
        hook = backbone.base_model.register_forward_hook(lambda *_: seen.append("keeping"))
        try:
            return before(backbone, *arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(Trainee, "hidden_states", training)
    monkeypatch.setattr(kept_states, "keep_states", keeping)
    return seen


def stop_at(last: int) -> Any:
    def progress(step: TrainStep) -> None:
        if step.step >= last:
            raise PowerCutError

    return progress


def kept(place: Path, out: str = "out") -> Path:
    return place / out / "checkpoints" / FOLDER


@pytest.mark.usefixtures("dtype")
@pytest.mark.parametrize("loss", ["ce", "lk", "l1"])
def test_kept_states_change_no_weight(loss: str, tmp_path: Path, forwards: list[str]) -> None:
    settings: dict[str, Any] = {"max_steps": 24, "batch_size": 4, "accumulation": 2, "loss": loss}
    settings["lm_heads"] = "own"
    do(tiny_run(tmp_path, "plain", **settings))
    assert forwards == ["training"] * 48
    forwards.clear()
    _, said = do(tiny_run(tmp_path, "out", **settings, keep_hidden=True))
    rows = int(said[0].split(" rows")[0].split()[-1])
    assert forwards == ["keeping"] * -(-rows // 4)
    assert products(tmp_path / "out") == products(tmp_path / "plain")
    assert not kept(tmp_path).exists()


def test_a_run_goes_on_with_the_states_that_it_kept(tmp_path: Path, forwards: list[str]) -> None:
    do(tiny_run(tmp_path, "whole", max_steps=24))
    forwards.clear()
    settings: dict[str, Any] = {"max_steps": 24, "save_steps": 5, "keep_hidden": True}
    with pytest.raises(PowerCutError):
        train(tiny_run(tmp_path, "out", **settings), stop_at(18), lambda _: None)
    assert set(forwards) == {"keeping"}
    forwards.clear()
    _, said = do(tiny_run(tmp_path, "out", **settings, resume=True))
    assert not forwards
    assert f"the hidden states in {kept(tmp_path)} are those of this run" in said[1]
    assert not kept(tmp_path).exists()
    assert products(tmp_path / "out") == products(tmp_path / "whole")


def test_a_run_may_go_on_without_its_kept_states(tmp_path: Path, forwards: list[str]) -> None:
    do(tiny_run(tmp_path, "whole", max_steps=24))
    for first in (True, False):
        forwards.clear()
        out = f"out-{first}"
        settings: dict[str, Any] = {"max_steps": 24, "save_steps": 5}
        with pytest.raises(PowerCutError):
            train(tiny_run(tmp_path, out, **settings, keep_hidden=first), stop_at(18), print)
        do(tiny_run(tmp_path, out, **settings, keep_hidden=not first, resume=True))
        assert {"keeping", "training"} == set(forwards)
        assert products(tmp_path / out) == products(tmp_path / "whole")
        assert not kept(tmp_path, out).exists()


@pytest.mark.parametrize("change", ["data", "weights", "config", "dtype", "loss", "cut", "key"])
def test_files_that_are_not_this_runs_are_made_anew(change: str, tmp_path: Path) -> None:
    recipe = make_recipe("medusa1", length=LENGTH, batch_size=1)
    backbone = random_model("llama").eval()
    rows = PackedRows(DOCUMENTS, LENGTH)
    dtype = torch.float32
    said: list[str] = []
    keep_states(backbone, rows, recipe, tmp_path, dtype, said.append)
    keep_states(backbone, rows, recipe, tmp_path, dtype, said.append)
    assert len(said) == 1
    file, key = tmp_path / FOLDER / "hidden", tmp_path / FOLDER / "key.json"
    before = file.stat().st_ino, key.read_text()
    if change == "data":
        rows = PackedRows(DOCUMENTS[::-1], LENGTH)
    elif change == "weights":
        backbone.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1
    elif change == "config":
        backbone.config.rms_norm_eps *= 2
    elif change == "dtype":
        dtype = torch.bfloat16
    elif change == "loss":
        recipe = replace(recipe, loss="kl")
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        key.unlink()  # as if the power had failed before the end
    found = keep_states(backbone, rows, recipe, tmp_path, dtype, said.append)
    assert len(said) == 1
    assert (key.read_text() == before[1]) is (change in ("cut", "key"))
    assert found[0]["hidden"].shape == (LENGTH, 32)
    drop_states(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_kept_states_are_the_backbones_own(tmp_path: Path) -> None:
    backbone = random_model("llama").eval()
    rows = PackedRows([replace(document, place="a.jsonl") for document in DOCUMENTS], LENGTH)
    recipe = make_recipe("medusa1", length=LENGTH, batch_size=8)
    found = keep_states(backbone, rows, recipe, tmp_path, torch.float32, print)
    assert len(found) == len(rows) == 2
    assert found.place(1) == rows.place(1) == "a.jsonl"
    for row in range(2):
        item = found[row]
        hidden = item.pop("hidden")
        assert all(torch.equal(item[name], tensor) for name, tensor in rows[row].items())
        inputs = (item["input_ids"][None], item["position_ids"][None])
        with torch.no_grad():
            output = backbone.model(input_ids=inputs[0], position_ids=inputs[1], use_cache=False)
        torch.testing.assert_close(hidden, output.last_hidden_state[0])
    assert bytes_in(tmp_path / FOLDER) == kept_bytes(2 * LENGTH, 32, 4)
    keep_states(backbone, rows, replace(recipe, loss="lk"), tmp_path, torch.float32, print)
    assert bytes_in(tmp_path / FOLDER) == kept_bytes(2 * LENGTH, 32, 4, LIKELIEST)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != "key.json")


# ---- the disk ----


def test_a_disk_that_is_too_small_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"the hidden states need 0\.0 GB in .*checkpoints") as told:
        do(tiny_run(tmp_path, "out", keep_hidden=True))
    assert "0.0 GB free on that disk; train without --keep-hidden" in str(told.value)
    assert "\n" not in str(told.value)
    assert not kept(tmp_path).exists()


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "out", keep_hidden=True)
    with full_disk() as limit:
        limit(4096)
        with pytest.raises(UserError, match=r"cannot write to .*checkpoints"):
            do(run)
    assert not kept(tmp_path).exists()


@pytest.mark.parametrize("name", ["medusa2", "distilled"])
def test_a_trained_backbone_has_no_states_to_keep(name: str) -> None:
    with pytest.raises(UserError, match=f"needs a frozen backbone: recipe medusa1, not {name}"):
        make_recipe(name, keep_hidden=True)


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_states, "PAUSE", 0.0)
    _, said = do(tiny_run(tmp_path, "out", keep_hidden=True))
    lines = [line for line in said if line.startswith("hidden states of ")]
    assert 5 <= len(lines) <= 20
    assert lines[0].endswith(" left")
