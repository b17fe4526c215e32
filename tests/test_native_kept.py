"""Packed matrices in the cache folder: mapped the next time, never instead of other weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_chat.commands.doctor import check_native
from medusa_chat.config import LoadOptions, ModelSpec
from medusa_chat.model import native_weights
from medusa_chat.model.loading import load_model
from medusa_chat.native import kept
from medusa_chat.native.step import NativeStep
from tests.helpers.native_library import need_library
from tests.helpers.tiny import prompt_ids, random_model, save_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

need_library()

KEY = ["1.0", ["model.safetensors", 5, 7]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_weights, "SLOW", 0.0)


def matrices() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(256, (size,), generator=draw).byte() for size in (640, 64, 100)]


def read(file: Path, key: object = KEY) -> list[Tensor]:
    """Take matrices until one is missing."""
    opened = kept.KeptMatrices(file, key)
    found = (opened.take(matrix.nbytes) for matrix in matrices())
    return [matrix for matrix in found if matrix is not None]


def test_what_was_written_is_read() -> None:
    file = kept.folder() / "one.packed"
    kept.write(file, KEY, matrices())
    assert len(read(file)) == 3
    assert all(torch.equal(*pair) for pair in zip(read(file), matrices(), strict=True))
    assert [path for path, _ in kept.files()] == [file]
    assert os.listdir(kept.folder()) == ["one.packed"]


def test_damaged_and_foreign_files_have_no_matrices(tmp_path: Path) -> None:
    file = tmp_path / "one.packed"
    kept.write(file, KEY, matrices())
    whole = file.read_bytes()
    assert read(file, ["1.1", *KEY[1:]]) == []
    assert read(tmp_path / "none.packed") == []
    for content in (
        b"",
        b"x" * 100,
        whole[:30],
        whole[:-1],
        whole + b"x",
        whole[:22] + b"\xff" * 90,
    ):
        file.write_bytes(content)
        assert read(file) == []
    file.write_bytes(whole.replace(bytes(matrices()[1]), bytes(64)))
    assert len(read(file)) == 1  # the matrices before the damage are sound
    file.write_bytes(whole)
    assert kept.KeptMatrices(file, KEY).take(64) is None


def test_files_that_were_used_longest_ago_make_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 3500)
    for place, name in enumerate("abc"):
        file = kept.folder() / f"{name}.packed"
        kept.write(file, KEY, matrices())
        os.utime(file, (place, place))
    read(kept.folder() / "a.packed")
    kept.write(kept.folder() / "d.packed", KEY, matrices())
    assert {path.stem for path, _ in kept.files()} == {"a", "c", "d"}


def logits_of(folder: Path, quant: str) -> Tensor:
    loaded = load_model(ModelSpec("tiny", str(folder), quant=quant), LoadOptions(device="cpu"))
    packed = loaded.backbone.native
    assert packed is not None
    step = NativeStep(packed.model, None, packed.team, loaded.backbone.new_cache(32))
    return step.prefill(prompt_ids(9)).clone()


def change(file: Path) -> None:
    """Change a weight of a checkpoint, but neither its size nor its time."""
    before = file.stat()
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 2
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_second_load_maps_what_the_first_one_packed(quant: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, random_model("llama", 320))
    file = folder / "model.safetensors"
    first = logits_of(folder, quant)
    change(file)
    assert torch.equal(logits_of(folder, quant), first)  # nothing of the file was packed again
    os.utime(file)
    second = logits_of(folder, quant)
    assert not torch.equal(second, first)
    (path,) = [path for path, _ in kept.files()]
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    assert torch.equal(logits_of(folder, quant), second)
    assert path.read_bytes() != content  # written anew


def test_packing_that_takes_no_time_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_weights, "SLOW", 60.0)
    logits_of(save_model(tmp_path, random_model("llama", 320)), "int8")
    assert kept.files() == []


def test_doctor_names_the_folder_and_its_size() -> None:
    assert f"no packed models are kept in {kept.folder()}" in [each.text for each in check_native()]
    kept.write(kept.folder() / "one.packed", KEY, matrices())
    text = next(each.text for each in check_native() if each.name == "packed")
    assert text.startswith(f"1 packed model in {kept.folder()}, ")
