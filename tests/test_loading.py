"""From what the user names to an engine; whatever is wrong with it is one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

import medusa_chat
from medusa_chat.config import ModelSpec
from medusa_chat.model.layouts import write_heads
from medusa_chat.model.loading import choose_device, choose_dtype, load_model
from tests.helpers.complaints import refusal
from tests.helpers.tiny import random_backbone, random_heads, random_model, reply, save_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model folder with heads beside the backbone."""
    folder = save_model(tmp_path_factory.mktemp("tiny"), random_model(vocabulary=260))
    backbone = random_backbone(vocabulary=260)
    write_heads(random_heads(backbone, 3), folder)
    (folder / "head_accuracy.json").write_text(
        json.dumps({"accuracy": [[0.5, 0.6], [0.3, 0.4], [0.2, 0.3]]})
    )
    return folder


@pytest.fixture
def folder(whole: Any, tmp_path: Path) -> Any:
    """A copy that a test may damage."""
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Any, heads: Any = None) -> str:
    return refusal(load_model, ModelSpec("tiny", str(folder), heads=heads), "cpu", "float32")


def test_a_folder_becomes_an_engine(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_chat.decoding.trees.costs.REPEATS", 1)
    engine = medusa_chat.load(str(whole), device="cpu", dtype="float32", probing=False)
    assert (engine.name, engine.heads, engine.notices, engine.context) == (whole.name, 3, [], 512)
    assert engine.trees.current.origin == "auto"
    prompt = [{"role": "user", "content": "hi"}]
    vanilla = reply(engine, prompt, mode="vanilla", max_new_tokens=12)
    assert reply(engine, prompt, max_new_tokens=12) == vanilla
    chosen = medusa_chat.load(
        str(whole), str(whole), device="cpu", dtype="float32", tree="chain-2", context=100
    )
    assert (len(chosen.trees.current), chosen.context) == (3, 100)


def test_heads_named_by_file_folder_and_not_at_all(whole: Any, folder: Any) -> None:
    heads = folder / "medusa_lm_head.safetensors"
    for named in (str(heads), str(folder), None):
        assert (
            load_model(ModelSpec("tiny", str(folder), heads=named), "cpu", "float32").heads.heads
            == 3
        )
    heads.unlink()
    loaded = load_model(ModelSpec("tiny", str(folder)), "cpu", "float32")
    assert (loaded.heads, loaded.accuracy) == (None, None)
    assert "there are no Medusa heads in" in load(folder, heads=str(folder))
    assert "there are no Medusa heads at" in load(folder, heads="./absent.safetensors")
    assert "there are no Medusa heads at" in load(folder, heads="absent")
    assert "lacks nobody/no-such-heads or a part of it" in load(
        folder, heads="nobody/no-such-heads"
    )


def test_unknown_models() -> None:
    assert "unknown model 'no-such-model'" in refusal(medusa_chat.load, "no-such-model")
    assert "lacks nobody/no-such-model or a part of it" in refusal(
        medusa_chat.load, "nobody/no-such-model"
    )
    assert "unknown model './absent/folder'" in refusal(medusa_chat.load, "./absent/folder")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "cannot load the model" in load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model_type": "no-such-type"}', '{"model_type": 3}', "\x00"]
)
def test_a_broken_config(folder: Any, text: Any) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder) in load(folder)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": -3}]
)
def test_a_config_that_makes_no_sense(folder: Any, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert str(folder) in load(folder)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-100], lambda b: b[:50], lambda b: b"", lambda b: b"\xff" * 99]
)
def test_damaged_weights(folder: Any, damage: Any) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert "cannot load the model" in load(folder)


def test_no_weights(folder: Any) -> None:
    (folder / "model.safetensors").unlink()
    assert "cannot load the model" in load(folder)


def test_a_missing_weight_is_never_random(folder: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert "weight model.layers.1.mlp.up_proj.weight is missing" in load(folder)


def test_a_weight_of_another_shape(folder: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, file, {"format": "pt"})
    assert "weight model.norm.weight has another shape" in load(folder)


def test_damaged_heads(folder: Any) -> None:
    file = folder / "medusa_lm_head.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "cannot read" in load(folder)


def test_heads_of_another_backbone(folder: Any) -> None:
    write_heads(random_heads(random_backbone(hidden_size=16), 2), folder)
    assert "trained for another model" in load(folder)


def test_no_chat_template(tmp_path: Path) -> None:
    save_model(tmp_path, random_model(vocabulary=260), chat_template=None)
    assert "--template NAME" in load(tmp_path)


@pytest.mark.parametrize("text", [None, "", "{", '{"version": "1.0"}'])
def test_no_tokenizer_or_a_broken_one(folder: Any, text: Any) -> None:
    (folder / "tokenizer.json").unlink() if text is None else (
        folder / "tokenizer.json"
    ).write_text(text)
    load(folder)


@pytest.mark.parametrize(
    "config",
    [
        T5Config(d_model=8, num_layers=1),
        BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1),
    ],
)
def test_models_that_do_not_chat(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    assert "cannot load" in load(tmp_path) or "not causal" in load(tmp_path)


def test_devices_and_number_formats() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    assert "there is no tpu device here" in refusal(choose_device, "tpu")
    if not torch.cuda.is_available():
        assert "there is no cuda:1 device here" in refusal(choose_device, "cuda:1")
    assert "names no device" in refusal(choose_device, "cpu:x")
    assert choose_dtype(torch.device("cpu"), "float16") == torch.float16
    assert choose_dtype(torch.device("cpu"), None) in (torch.bfloat16, torch.float32)
    assert choose_dtype(torch.device("cpu"), "auto") == choose_dtype(torch.device("cpu"), None)
    assert "float32" in refusal(choose_dtype, torch.device("cpu"), "float8")


def test_bfloat16_runs_too(whole: Any) -> None:
    engine = medusa_chat.load(str(whole), device="cpu", dtype="bfloat16", tree="chain-3")
    assert len(reply(engine, [1, 2, 3], max_new_tokens=8)) == 8
