"""Recipes: their settings, errors and schedules, and the first state of heads and adapters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from medusa_chat.cli import make_parser
from medusa_chat.commands.flags import given_fields
from medusa_chat.config import RECIPES, Recipe, UserError, make_recipe
from medusa_chat.settings import help_of
from medusa_chat.training.schedules import backbone_rate, heads_rate, heads_weight, joint_from
from medusa_chat.training.starting import describe, new_heads
from medusa_chat.training.trainee import Trainee, adapt
from tests.helpers.tiny import random_model


def test_the_released_settings() -> None:
    """The base rate times the heads' multiplier of 4, lambda_0, ramp, LoRA, warm-up."""
    names = ("learning_rate", "backbone_learning_rate", "lambda_0", "ramp", "warmup_steps", "decay")
    lora = ("lora_rank", "lora_alpha", "lora_dropout", "epochs")
    expected = {
        "medusa1": (2e-3, 5e-4, 0.2, "constant", 40, 0.8),
        "medusa2": (2e-3, 5e-4, 0.2, "constant", 40, 0.8),
        "distilled": (4e-4, 1e-4, 0.01, "sine", 20, 0.8),
    }
    assert set(RECIPES) == set(expected)
    for name, settings in expected.items():
        recipe = make_recipe(name)
        assert tuple(getattr(recipe, field) for field in names) == settings
        assert tuple(getattr(recipe, field) for field in lora) == (32, 16, 0.05, 2.0)
        assert recipe.joint is (name != "medusa1")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "medusa3"}, "unknown recipe 'medusa3'; there are medusa1, medusa2, distilled"),
        ({"heads": 0}, "heads must be above 0"),
        ({"epochs": float("nan")}, "epochs must be above 0"),
        ({"epochs": float("inf")}, "epochs must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above"),
        ({"decay": 0.0}, "decay must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"lambda_0": float("inf")}, "lambda_0 must be 0 or more"),
        ({"seed": -1}, "seed must be between 0"),
        ({"backbone_learning_rate": -1.0}, "backbone_learning_rate must be 0 or more"),
        ({"lm_heads": "mine"}, "lm_heads must be one of auto, own, shared, not 'mine'"),
        ({"ramp": "cosine"}, "ramp must be one of constant, sine"),
        ({"quant": "int3"}, "quant must be one of none, nf4, nf4-double, int8, not 'int3'"),
        ({"length": 5}, "rows of 5 tokens are too short for 4 heads"),
        ({"heads_first": 1.0}, "heads_first must be from 0 to below 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must"),
        ({"lora_rank": -1}, "lora_rank must be 0"),
        ({"save_steps": 0}, "save_steps must be above 0"),
        ({"name": "distilled", "lora_rank": 0}, "distilled needs an adapter to switch off"),
        ({"name": "medusa2", "lora_rank": 0, "quant": "nf4"}, "a backbone in nf4 needs an adapter"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as refusal:
        make_recipe(**{"name": "medusa1"} | changes)
    assert "\n" not in str(refusal.value)


def test_flags_change_the_recipe_that_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    def read(*words: str) -> Recipe:
        train = ["train", "--model", "m", "--data", "d", "--out", "o", *words]
        return make_recipe(**given_fields(make_parser().parse_args(train), Recipe))

    assert read() == make_recipe("medusa1")
    assert read("--recipe", "distilled") == make_recipe("distilled")
    flags = (
        "--recipe",
        "distilled",
        "--lambda-0",
        "0.5",
        "--no-gradient-checkpointing",
        "--accumulation",
        "3",
    )
    assert read(*flags) == make_recipe("distilled", lambda_0=0.5, accumulation=3)
    assert read("--gradient-checkpointing").gradient_checkpointing
    assert set(help_of(Recipe)) == set(Recipe.__dataclass_fields__)
    with pytest.raises(SystemExit):
        make_parser().parse_args(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "the same seed gives the same weights (default: 0)" in told
    assert (
        "weight of the heads' loss relative to the backbone's (default: 0.2, distilled 0.01)"
        in told
    )
    for wrong in (("--heads", "two"), ("--epochs", "x"), ("--ramp", "up")):
        with pytest.raises(UserError):
            read(*wrong)


# ---- schedules ----


@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
def test_the_heads_rate_rises_and_falls_in_a_half_cosine(warmup: int) -> None:
    recipe = make_recipe("medusa1", warmup_steps=warmup)
    for t in range(31):
        if t < warmup:
            expected = t / warmup
        else:
            expected = (
                (1 + math.cos(math.pi * (t - warmup) / (30 - warmup))) / 2 if warmup < 30 else 0
            )
        assert heads_rate(recipe, t, 30) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("share", "begin"), [(0.0, 0), (0.25, 10), (0.5, 20), (0.99, 40)])
def test_the_backbone_waits_for_the_heads(share: float, begin: int) -> None:
    recipe = make_recipe("medusa2", heads_first=share, warmup_steps=4)
    assert joint_from(recipe, 40) == begin
    assert joint_from(replace(recipe, name="medusa1"), 40) == 40
    for t in range(40):
        since, left = t - begin, 40 - begin
        if since < 0:
            expected = 0.0
        elif since < 4:
            expected = since / 4
        else:
            expected = (1 + math.cos(math.pi * (since - 4) / (left - 4))) / 2
        assert backbone_rate(recipe, t, 40) == pytest.approx(expected, abs=1e-12)


def test_the_weight_of_the_heads() -> None:
    for t in (0, 1, 7, 20):
        assert heads_weight(make_recipe("medusa1"), t, 20) == 1
        assert heads_weight(make_recipe("medusa2"), t, 20) == 0.2
        sine = 0.01 * math.sin(math.pi * t / 40)
        assert heads_weight(make_recipe("distilled"), t, 20) == pytest.approx(sine, abs=1e-12)
        assert heads_weight(
            make_recipe("medusa2", ramp="sine", lambda_0=3.0), t, 20
        ) == pytest.approx(300 * sine)


# ---- what is trained ----


@pytest.mark.parametrize(
    ("lm_heads", "vocabulary", "own"),
    [("own", 64, True), ("shared", 64, False), ("auto", 8, True), ("auto", 64, False)],
)
def test_new_heads_guess_like_the_lm_head(lm_heads: str, vocabulary: int, own: bool) -> None:
    backbone = random_model("llama", vocabulary)
    heads = new_heads(backbone, make_recipe("medusa1", heads=3, layers=2, lm_heads=lm_heads))
    # 3 LM heads of 8 x 32 are 6 percent of 13 thousand parameters, 3 of 64 x 32 a third.
    share = 3 * backbone.lm_head.weight.numel() / sum(p.numel() for p in backbone.parameters())
    assert lm_heads != "auto" or own is (share < 0.12)
    assert (heads.lm_heads is not None) is own
    hidden = torch.randn(5, 32)
    for guess in heads.logits(hidden, backbone.lm_head):
        torch.testing.assert_close(guess, backbone.lm_head(hidden))


def test_an_adapter_is_on_every_linear_layer_but_a_tied_lm_head() -> None:
    for kind, lm_head in (("llama", True), ("llama-tied", False)):
        backbone = random_model(kind).requires_grad_(False)
        adapt(backbone, make_recipe("medusa2", lora_rank=2))
        adapted = {
            name.split(".lora_A")[0] for name, _ in backbone.named_parameters() if "lora_A" in name
        }
        layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        wanted = {f"model.layers.{n}.{name}" for n in range(2) for name in layer}
        assert adapted == wanted | ({"lm_head"} if lm_head else set())
        assert {p.requires_grad for n, p in backbone.named_parameters() if "lora_" in n} == {True}
        assert {p.requires_grad for n, p in backbone.named_parameters() if "lora_" not in n} == {
            False
        }


def test_the_heads_are_described_by_their_size() -> None:
    recipe = make_recipe("medusa1", heads=3, layers=2, lm_heads="own")
    backbone = random_model("llama", 64).requires_grad_(False)
    blocks, lm_heads = 3 * 2 * 32 * 32 * 2 / 1000, 3 * 64 * 32 * 2 / 1000  # kB in 16 bits
    text = describe(Trainee(backbone, new_heads(backbone, recipe), recipe))
    assert text.startswith(
        f"3 heads of 2 blocks own their LM heads ({blocks + lm_heads:.1f} kB, {lm_heads:.1f} kB of"
    )
    assert text.endswith(f"; {3 * (2 * (32 * 32 + 32) + 64 * 32):,} parameters are trained")
    shared = replace(recipe, lm_heads="shared")
    text = describe(Trainee(backbone, new_heads(backbone, shared), shared))
    assert (
        f"share the LM head ({blocks:.1f} kB; LM heads of their own would add {lm_heads:.1f} kB"
        in text
    )
