"""A named model becomes an engine; each fault of its files is a UserError of one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

import medusa_chat
from medusa_chat.config import LoadOptions, Message, ModelSpec, UserError
from medusa_chat.machine.devices import choose_device, choose_dtype
from medusa_chat.model.layouts import write_heads
from medusa_chat.model.loading import load_model
from tests.helpers.complaints import refusal
from tests.helpers.tiny import random_backbone, random_heads, random_model, reply, save_model

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with heads."""
    folder = save_model(tmp_path_factory.mktemp("tiny"), random_model(vocabulary=260))
    backbone = random_backbone(vocabulary=260)
    write_heads(random_heads(backbone, 3), folder)
    (folder / "head_accuracy.json").write_text(
        json.dumps({"accuracy": [[0.5, 0.6], [0.3, 0.4], [0.2, 0.3]]})
    )
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path, dirs_exist_ok=True))


FLOAT32 = LoadOptions(device="cpu", dtype="float32")


def load(folder: Path, heads: str | None = None) -> str:
    """Return the error of loading a folder."""
    return refusal(load_model, ModelSpec("tiny", str(folder), heads=heads), FLOAT32)


def test_a_folder_becomes_an_engine(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_chat.decoding.trees.costs.REPEATS", 1)
    engine = medusa_chat.load(str(whole), device="cpu", dtype="float32", probing=False)
    assert (engine.name, engine.heads, engine.notices, engine.context) == (whole.name, 3, [], 512)
    assert engine.trees.current.origin == "auto"
    prompt = [{"role": "user", "content": "hi"}]
    vanilla = reply(engine, prompt, mode="vanilla", temperature=0, max_new_tokens=12)
    assert reply(engine, prompt, max_new_tokens=12) == vanilla
    chosen = medusa_chat.load(
        str(whole), str(whole), device="cpu", dtype="float32", tree="chain-2", context=100
    )
    assert (len(chosen.trees.current), chosen.context) == (3, 100)


def test_heads_named_by_file_folder_and_not_at_all(folder: Path) -> None:
    heads = folder / "medusa_heads" / "medusa_lm_head.safetensors"
    for named in (str(heads), str(folder), None):
        found = load_model(ModelSpec("tiny", str(folder), heads=named), FLOAT32).heads
        assert found is not None
        assert found.heads == 3
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    old = heads.rename(folder / heads.name)  # as folders had them before
    found = load_model(ModelSpec("tiny", str(folder)), FLOAT32).heads
    assert found is not None
    assert found.heads == 3
    old.unlink()
    loaded = load_model(ModelSpec("tiny", str(folder)), FLOAT32)
    assert (loaded.heads, loaded.accuracy) == (None, None)
    assert "there are no Medusa heads in" in load(folder, heads=str(folder))
    assert "there are no Medusa heads at" in load(folder, heads="./absent.safetensors")
    assert "there are no Medusa heads at" in load(folder, heads="absent")
    missing = load(folder, heads="nobody/no-such-heads")
    assert "lacks nobody/no-such-heads or a part of it" in missing


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
def test_a_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder) in load(folder)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": -3}]
)
def test_a_config_that_makes_no_sense(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert str(folder) in load(folder)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-100], lambda b: b[:50], lambda _b: b"", lambda _b: b"\xff" * 99]
)
def test_damaged_weights(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert "cannot load the model" in load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_weight_that_is_no_number_is_named(folder: Path, name: str, value: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][200 % len(tensors[name]), 0] = value
    save_file(tensors, file, {"format": "pt"})
    assert f"weight {name} holds NaN or infinity" in load(folder)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_other_kinds_of_numbers_are_refused(folder: Path, kind: torch.dtype) -> None:
    file = folder / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(kind)}, file, {"format": "pt"})
    line = load(folder)
    assert f"{file}: weight {name} holds" in line
    assert "no quantization" in line


def test_a_damaged_header_is_told_with_its_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64)
    line = load(folder)
    assert f"cannot load the model {folder}: cannot read {file}: " in line
    assert "header too large" in line


@pytest.mark.parametrize(
    "text", ["{", "[]", "\xff", '{"eos_token_id": {"a": 1}}', '{"eos_token_id": ["x"]}']
)
def test_a_damaged_generation_config_is_an_error(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    assert f"{folder / 'generation_config.json'}" in load(folder)


def test_values_of_other_types_are_errors_with_their_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": {"a": 1}}))
    assert f"{folder / 'config.json'}: eos_token_id must be" in load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": "abc"}))
    line = load(folder)
    assert "attention_bias" in line
    assert "abc" in line
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": "abc"}')
    assert "cannot load the model" in load(folder) or "model_max_length" in load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_config", "x"),
        ("num_hidden_layers", 0),
        ("max_position_embeddings", -1),
        ("max_position_embeddings", 1 << 63),
        ("sliding_window", [1]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    ],
)
def test_values_that_no_step_computes_with_are_errors_with_their_file(
    name: str, value: object, folder: Path
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    words = refusal(load_model, ModelSpec("tiny", str(folder)), LoadOptions(device="cpu"))
    told = "rope_theta" if name == "rope_parameters" else name
    assert f"cannot read {file}: {told}" in words


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "cannot load the model" in load(folder)


def test_a_missing_weight_is_never_random(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert "weight model.layers.1.mlp.up_proj.weight is missing" in load(folder)


def test_a_weight_of_another_shape(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, file, {"format": "pt"})
    assert "weight model.norm.weight has another shape" in load(folder)


def test_damaged_heads(folder: Path) -> None:
    file = folder / "medusa_heads" / "medusa_lm_head.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "cannot read" in load(folder)


def test_heads_of_another_backbone(folder: Path) -> None:
    write_heads(random_heads(random_backbone(hidden_size=16), 2), folder)
    assert "trained for another model" in load(folder)


@pytest.mark.parametrize("text", [None, "", "{", '{"version": "1.0"}'])
def test_no_tokenizer_or_a_broken_one(folder: Path, text: str | None) -> None:
    file = folder / "tokenizer.json"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
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


def test_bfloat16_runs_too(whole: Path) -> None:
    engine = medusa_chat.load(str(whole), device="cpu", dtype="bfloat16", tree="chain-3")
    assert len(reply(engine, [1, 2, 3], max_new_tokens=8)) == 8


class PanicException(BaseException):
    """Raised by libraries in Rust; it is no Exception."""


def test_a_panic_of_the_tokenizer_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = medusa_chat.load(str(folder), device="cpu", dtype="float32", probing=False)

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(type(engine.tokenizer), "__call__", panic)
    with pytest.raises(UserError, match="the tokenizer fails on this text: index out of bounds"):
        engine.encode([Message(role="user", content="Hi")])
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    assert "cannot load the model" in load(folder)
