"""Adapters on a quantized backbone learn the same as on those weights in full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.config import ModelSpec, make_recipe
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.training.data import Example, PackedRows
from medusa_chat.training.starting import new_heads
from medusa_chat.training.trainee import Trainee, adapt
from tests.helpers.tiny import random_model
from tests.helpers.tiny_runs import backbone_folder

if TYPE_CHECKING:
    from pathlib import Path

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
}  # bitsandbytes' blocks are of 64
ROWS = PackedRows([Example(list(range(5, 45)), [True] * 40)], 20)
BATCH = {key: torch.stack([ROWS[i][key] for i in range(len(ROWS))]) for key in ROWS[0]}


def full_precision(module: Any) -> torch.Tensor:
    """The weight of a quantized layer in full precision."""
    if hasattr(module.weight, "quant_state"):
        dequantize = bitsandbytes.functional.dequantize_4bit
        weight: torch.Tensor = dequantize(module.weight.data, module.weight.quant_state)
        return weight
    scaled: torch.Tensor = module.weight.SCB[:, None] * module.weight.data / 127
    return scaled


def trainees(folder: Path, name: str, quant: str) -> tuple[Trainee, Trainee]:
    """A trainee on a quantized backbone, and one on plain layers with the same weights."""
    recipe = make_recipe(
        name, heads=2, lora_rank=2, lora_dropout=0.0, heads_first=0.0, lambda_0=0.5
    )
    quantized, _ = load_pretrained(ModelSpec("tiny", str(folder)), torch.float32, quant)
    plain = random_model("llama", 320, **SHAPE)
    for layer_name, module in quantized.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            plain.get_submodule(layer_name).weight.data = full_precision(module)
    made = []
    for backbone in (quantized, plain):
        backbone.requires_grad_(False)
        adapter = adapt(backbone, recipe)
        made.append(Trainee(backbone, new_heads(backbone, recipe), recipe, adapter))
        made[-1].train()
        made[-1].step = 1
    return made[0], made[1]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["medusa2", "distilled"])
def test_loss_and_gradient_on_quantized_weights(name: str, quant: str, tmp_path: Path) -> None:
    ours, plain = trainees(backbone_folder(tmp_path / "backbone", **SHAPE), name, quant)
    torch.manual_seed(0)
    weights = dict(plain.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
            weights[parameter_name].data.copy_(parameter.data)
    for _ in range(2):  # the second time over weights that have been used
        losses = []
        for trainee in (ours, plain):
            trainee.zero_grad()
            (loss,) = trainee(**BATCH)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        for parameter_name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                wanted = weights[parameter_name].grad
                assert wanted is not None
                assert parameter.grad is not None, parameter_name
                off = (parameter.grad - wanted).norm() / wanted.norm()
                assert off < 0.02, parameter_name


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_an_untrained_adapter_is_at_no_distance_from_its_teacher(
    quant: str, tmp_path: Path
) -> None:
    ours, plain = trainees(
        backbone_folder(tmp_path / "backbone", **SHAPE),
        "distilled",
        "nf4" if quant == "none" else quant,
    )
    trainee = plain if quant == "none" else ours
    for _ in range(2):
        trainee(**BATCH)[0].backward()
        assert abs(trainee.meter.read()["backbone_loss"]) < 1e-6
        assert trainee.backbone.training
