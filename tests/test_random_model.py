"""Random models of a given shape: in memory in each quantization, and as a checkpoint on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import medusa_chat
from medusa_chat.bench.random_model import main, random_heads, random_model, write_random_model
from medusa_chat.config import LoadOptions, Message, ModelSpec, UserError
from medusa_chat.decoding.engine import Engine
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.sampling import Sampling
from medusa_chat.shapes import SHAPES, Shape
from tests.helpers.tiny import reply, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = Shape(
    layers=3, hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=4096, context=256
)
CPU = torch.device("cpu")


def made(shape: Shape = SHAPE, quant: Any = "none", dtype: torch.dtype = torch.float32) -> Any:
    return random_model(shape, quant=quant, dtype=dtype, device=CPU)


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-double", "int8"])
def test_a_random_model_has_its_shape_and_finite_states(quant: str) -> None:
    model = made(quant=quant)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    backbone = Backbone(model)  # compares its tree attention with the model's own
    assert Shape.of(backbone.config.to_dict()) == SHAPE
    hidden = backbone.hidden_of_text(torch.arange(20))
    assert hidden.isfinite().all()
    # Quantized states stay near the plain ones.
    plain = Backbone(made()).hidden_of_text(torch.arange(20))
    near = torch.nn.functional.cosine_similarity(hidden, plain).min()
    assert near > {"none": 0.9999, "int8": 0.99}.get(quant, 0.9)


def test_layers_share_no_memory() -> None:
    for quant in ("none", "nf4", "int8"):
        layers = made(quant=quant).model.layers
        places = {layer.mlp.up_proj.weight.data_ptr() for layer in layers}
        assert len(places) == len(layers)


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_has_the_parameters_of_its_shape(tied: bool) -> None:
    shape = replace(SHAPE, tied=tied)
    assert sum(parameter.numel() for parameter in made(shape).parameters()) == shape.parameters


@pytest.mark.parametrize("own", [False, True])
def test_random_heads_fit_the_model(own: bool) -> None:
    backbone = Backbone(made())
    heads = random_heads(SHAPE, 3, own, layers=2, dtype=torch.float32)
    assert (heads.heads, heads.layers) == (3, 2)
    logits = heads.logits(backbone.hidden_of_text(torch.arange(4)), backbone.lm_head)
    assert logits.shape == (3, 4, SHAPE.vocabulary)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_model_loads_and_decodes(tied: bool, tmp_path: Path) -> None:
    shape = replace(SHAPE, tied=tied)
    write_random_model(shape, tmp_path, heads=2, own=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == shape.layers + 1
    assert Shape.of(json.loads((tmp_path / "config.json").read_text())) == shape
    engine: Engine = medusa_chat.load(str(tmp_path), device="cpu", tree="chain-2", probing=False)
    assert engine.heads == 2
    prompt: list[Message] = [{"role": "user", "content": "hi"}]
    steps = list(engine.generate(prompt, Sampling(max_new_tokens=8, ignore_eos=True)))
    assert sum(len(step.tokens) for step in steps) == 8
    model, _ = load_pretrained(ModelSpec("written", str(tmp_path)), None)
    assert model.dtype == torch.bfloat16
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers[:2])
    assert not torch.equal(first, second)


def test_a_full_disk_leaves_no_half_written_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def failing(_: dict[str, torch.Tensor], file: Path, **__: Any) -> None:
        file.write_bytes(b"half")
        saved.append(file)
        if len(saved) > 1:
            raise OSError("No space left on device")

    monkeypatch.setattr("medusa_chat.bench.random_model.save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        write_random_model(SHAPE, tmp_path, heads=0, own=False)
    assert [file.name for file in tmp_path.glob("model*")] == ["model-00001-of-00004.safetensors"]
    assert not (tmp_path / "config.json").exists()


def test_the_command_refuses_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="vocabulary of 4096 or more"):
        write_random_model(replace(SHAPE, vocabulary=100), tmp_path / "small", heads=0, own=False)
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["random_model", "tiny", str(tmp_path / "file")])
    assert main() == 2
    assert "File exists" in capsys.readouterr().err
    monkeypatch.setattr(
        "sys.argv", ["random_model", "tiny", str(tmp_path / "model"), "--heads", "0"]
    )
    assert main() == 0
    assert not (tmp_path / "model" / "medusa_heads" / "medusa_lm_head.safetensors").exists()


def test_a_random_model_decodes_with_random_heads() -> None:
    engine = Engine(
        Backbone(made()),
        random_heads(SHAPE, 3, True, dtype=torch.float32),
        tokenizer(),
        LoadOptions(tree="chain-3", probing=False),
    )
    vanilla = reply(engine, [5, 6, 7], mode="vanilla", temperature=0, max_new_tokens=12)
    assert reply(engine, [5, 6, 7], max_new_tokens=12) == vanilla
