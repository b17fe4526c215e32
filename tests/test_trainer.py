"""Runs of the trainer on a tiny model: the weights they change, rates, log, and NaN guard."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.config import UserError
from medusa_chat.model.layouts import OWN_HEADS, read_heads
from medusa_chat.training import trainer as module
from medusa_chat.training.optimization import MedusaTrainer
from medusa_chat.training.trainee import Trainee
from tests.helpers.tiny_runs import backbone_folder, do, log_of, products, tiny_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers whether or not the processor has bfloat16."""
    monkeypatch.setattr(module, "choose_dtype", lambda *_: torch.float32)


PROBE = torch.arange(1, 60)[None]


@torch.no_grad()
def weights_hash(model: Any) -> str:
    """Hash every weight in memory, the scales of quantized ones, and the model's logits."""
    # First, since on a CPU bitsandbytes changes its weights' layout at their first use.
    logits = model(PROBE).logits
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "logits": logits}
    for name, parameter in model.named_parameters():
        for part in ("absmax", "SCB"):
            scales = getattr(getattr(parameter, "quant_state", parameter), part, None)
            if scales is not None:
                tensors[f"{name}.{part}"] = scales
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(
            name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return whole.hexdigest()


@pytest.fixture
def trainees(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Trainee, str]]:
    """The trainees that runs make, with the hash of their backbones before."""
    made: list[tuple[Trainee, str]] = []
    plain = module.make_trainee

    def spy(*arguments: Any, **named: Any) -> tuple[Trainee, Any]:
        trainee, tokenizer = plain(*arguments, **named)
        made.append((trainee, weights_hash(trainee.backbone)))
        return trainee, tokenizer

    monkeypatch.setattr(module, "make_trainee", spy)
    return made


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_medusa1_learns_and_leaves_the_backbone_alone(
    quant: str, tmp_path: Path, trainees: list[tuple[Trainee, str]]
) -> None:
    # bitsandbytes splits rows into blocks of 64.
    shape: dict[str, Any] = {} if quant == "none" else {"hidden_size": 64, "intermediate_size": 128}
    folder = backbone_folder(tmp_path / "backbone", **shape)
    before = products(folder)
    settings: dict[str, Any] = {
        "layers": 2,
        "max_steps": 20,
        "learning_rate": 0.02,
        "batch_size": 4,
        "quant": quant,
    }
    steps, _ = do(tiny_run(tmp_path, "out", **settings))
    ((trainee, untouched),) = trainees
    kinds = {type(module).__name__ for module in trainee.backbone.modules()}
    assert {"none": "Linear", "nf4": "Linear4bit", "int8": "Linear8bitLt"}[quant] in kinds
    assert products(folder) == before
    assert weights_hash(trainee.backbone) == untouched
    assert not trainee.backbone.training
    assert all(p.grad is None and not p.requires_grad for p in trainee.backbone.parameters())
    assert products(tmp_path / "out").keys() == {OWN_HEADS}
    heads = read_heads(tmp_path / "out" / OWN_HEADS, shape.get("hidden_size", 32), 320).heads
    assert (heads.heads, heads.layers, heads.lm_heads) == (2, 2, None)
    assert all(heads.weight[layer, head].abs().max() > 0 for layer in range(2) for head in range(2))
    torch.testing.assert_close(heads.weight, trainee.heads.weight.to(torch.bfloat16))
    assert steps[-1].step == 20
    assert all(
        last < 0.9 * first
        for first, last in zip(steps[0].head_loss, steps[-1].head_loss, strict=True)
    )


def test_the_optimizer_gets_the_rates_of_the_formulas(tmp_path: Path) -> None:
    own = {
        "max_steps": 16,
        "warmup_steps": 3,
        "logging_steps": 1,
        "heads_first": 0.25,
        "ramp": "sine",
    }
    do(
        tiny_run(
            tmp_path,
            "out",
            "medusa2",
            learning_rate=0.01,
            backbone_learning_rate=0.004,
            lambda_0=0.5,
            **own,
        )
    )
    log = log_of(tmp_path / "out")
    assert [line["step"] for line in log] == list(range(1, 17))
    for line in log:  # after t steps, the rates of the step to come
        t = line["step"]
        heads = t / 3 if t < 3 else (1 + math.cos(math.pi * (t - 3) / 13)) / 2
        since = t - 4
        backbone = (
            0
            if since < 0
            else since / 3
            if since < 3
            else (1 + math.cos(math.pi * (since - 3) / 9)) / 2
        )
        assert line["learning_rates"] == pytest.approx(
            [0.01 * heads, 0.004 * backbone], rel=1e-4, abs=1e-9
        )
        assert line["heads_weight"] == pytest.approx(0.5 * math.sin(math.pi / 2 * t / 16), rel=1e-4)
        assert (line["backbone_loss"] is None) is (t <= 4)
    for line in log[1:4]:  # what was trained on had the weight that stood in the log before
        weight = 0.5 * math.sin(math.pi / 2 * (line["step"] - 1) / 16)
        assert line["loss"] == pytest.approx(
            weight * sum(0.8**k * x for k, x in enumerate(line["head_loss"], 1)), rel=1e-3
        )


def test_the_backbone_does_not_change_in_the_stage_of_the_heads(
    tmp_path: Path, trainees: list[Any]
) -> None:
    found: list[dict[str, torch.Tensor]] = []

    def watch(_: Any) -> None:
        named = trainees[-1][0].backbone.named_parameters()
        # These begin at zero.
        found.append({name: p.detach().clone() for name, p in named if "lora_B" in name})

    run = tiny_run(tmp_path, "out", "medusa2", heads_first=0.5, max_steps=10, logging_steps=5)
    module.train(run, watch, lambda _: None)
    first, last = found
    assert len(first) == 15
    assert not any(weight.any() for weight in first.values())
    assert all(weight.any() for weight in last.values())


def test_every_kind_of_layer_is_trained(
    tmp_path: Path, trainees: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for out, name, changes in (
        ("1", "medusa1", {"lm_heads": "own"}),
        ("2", "medusa2", {}),
        ("3", "medusa2", {"lora_rank": 0}),
        ("4", "distilled", {"lambda_0": 0.5, "layers": 2}),
    ):
        begun: dict[str, torch.Tensor] = {}
        fit = module.fit

        def spy(*arguments: Any, begun: dict[str, torch.Tensor] = begun, fit: Any = fit) -> None:
            begun |= {n: p.detach().clone() for n, p in trainees[-1][0].named_parameters()}
            fit(*arguments)

        monkeypatch.setattr(module, "fit", spy)
        do(tiny_run(tmp_path, out, name, heads_first=0.0, **changes))
        monkeypatch.setattr(module, "fit", fit)
        for parameter_name, parameter in trainees[-1][0].named_parameters():
            moved = (parameter.detach() != begun[parameter_name]).any()
            assert moved == parameter.requires_grad, parameter_name


@pytest.mark.usefixtures("float32")
def test_several_batches_make_the_step_of_one_large_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[torch.Tensor] = []
    plain = MedusaTrainer.create_optimizer

    def watched(self: Any, model: Any = None) -> Any:
        optimizer = plain(self, model)
        weight = self.model.heads.weight
        optimizer.register_step_pre_hook(lambda *_: gradients.append(weight.grad.clone()))
        return optimizer

    monkeypatch.setattr(MedusaTrainer, "create_optimizer", watched)
    for out, batch, accumulation in (("large", 4, 1), ("small", 2, 2)):
        run = tiny_run(tmp_path, out, batch_size=batch, accumulation=accumulation, max_steps=4)
        text = "the cat sat on a mat and saw nine red birds " * 64
        # Whole rows, with as many targets each.
        (tmp_path / "talks.jsonl").write_text(json.dumps({"text": text[: 32 * 80 - 1]}))
        steps, _ = do(run)
        assert [step.step for step in steps] == [2, 4]
    large, small = gradients[:4], gradients[4:]
    assert len(small) == 4
    torch.testing.assert_close(small[0], large[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(small[3], large[3], rtol=0.05, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_weights(
    tmp_path: Path, trainees: list[Any], recwarn: Any
) -> None:
    for out, on in (("plain", False), ("checkpointed", True)):
        do(tiny_run(tmp_path, out, "medusa2", gradient_checkpointing=on))
        layers = trainees[-1][0].backbone.model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [on] * len(layers)
    assert products(tmp_path / "plain") == products(tmp_path / "checkpointed")
    assert not [str(w.message) for w in recwarn if "checkpointing" in str(w.message)]


def test_a_run_begins_with_the_heads_that_it_is_given(tmp_path: Path, trainees: list[Any]) -> None:
    do(tiny_run(tmp_path, "first", layers=2))
    steps, _ = do(
        tiny_run(
            tmp_path, "second", "medusa2", heads_from=str(tmp_path / "first"), learning_rate=1e-9
        )
    )
    heads = read_heads(tmp_path / "first" / OWN_HEADS, 32, 320).heads
    torch.testing.assert_close(
        trainees[-1][0].heads.weight, heads.weight.float(), atol=1e-6, rtol=0
    )
    assert trainees[-1][0].heads.layers == 2
    assert steps[0].backbone_loss is not None  # heads that have learnt need no stage of their own


# ---- log ----


def test_the_log_has_each_step_once(tmp_path: Path) -> None:
    steps, said = do(tiny_run(tmp_path, "out", "medusa2", heads_first=0.0))
    log = log_of(tmp_path / "out")
    assert [line["step"] for line in log] == [step.step for step in steps] == [2, 4, 6, 8, 10]
    for line, step in zip(log, steps, strict=True):
        assert line["total"] == 10
        for key in ("head_loss", "top1", "top5"):
            assert line[key] == pytest.approx(getattr(step, key), rel=1e-4)
            assert len(line[key]) == 2
        assert all(0 <= a <= b <= 1 for a, b in zip(line["top1"], line["top5"], strict=True))
        assert line["backbone_loss"] == pytest.approx(step.backbone_loss, rel=1e-4)
        assert min(line["loss"], line["memory"], line["tokens_per_second"]) > 0
    assert [line["seconds_left"] > 0 for line in log] == [True] * 4 + [False]
    assert "tokens in" in said[0]
    settings = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (settings["recipe"], settings["model"]) == ("medusa2", str(tmp_path / "backbone"))


# ---- NaN ----


def poison(trainee: Trainee, kind: str, step: int) -> None:
    """Make the loss, or the gradient of a finite loss, not a number from a step on."""
    if kind == "loss":
        trainee.register_forward_hook(
            lambda made, _, output: output if made.step < step else (output[0] * math.nan,)
        )
    else:
        bias: Any = trainee.heads.bias
        bias.register_hook(
            lambda gradient: gradient if trainee.step < step else gradient * math.inf
        )


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_run_stops_where_it_meets_nan(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module.make_trainee

    def poisoned(*arguments: Any, **named: Any) -> tuple[Trainee, Any]:
        trainee, tokenizer = plain(*arguments, **named)
        poison(trainee, kind, 6)
        trainee.register_forward_pre_hook(
            lambda _, __, named: seen.append(named["rows"].tolist()), with_kwargs=True
        )
        return trainee, tokenizer

    monkeypatch.setattr(module, "make_trainee", poisoned)
    seen: list[list[int]] = []
    with pytest.raises(UserError) as stop:
        do(tiny_run(tmp_path, "out", save_steps=3))
    text = str(stop.value)
    assert "the loss or its gradient is not a number at step 7" in text
    assert len(seen) == 7
    for row in seen[-1]:
        assert f"row {row} ({tmp_path}/talks.jsonl, line " in text
    assert "\n" not in text
    checkpoints = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]
    assert products(tmp_path / "out") == {}
    assert all(line["step"] <= 6 for line in log_of(tmp_path / "out"))
    monkeypatch.undo()
    do(tiny_run(tmp_path, "out", save_steps=3, resume=True))  # and the checkpoint is sound
    do(tiny_run(tmp_path, "whole", save_steps=3))
    assert products(tmp_path / "out") == products(tmp_path / "whole")


# ---- memory ----


def test_nothing_of_the_run_is_held_while_the_backbones_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def count(*_: Any) -> float:
        gc.collect()
        held.append(sum(type(thing) is Trainee for thing in gc.get_objects()))
        return 1.0

    gc.collect()
    already = sum(type(thing) is Trainee for thing in gc.get_objects())
    monkeypatch.setattr(module, "perplexity_of", count)
    do(tiny_run(tmp_path, "out", "medusa2", max_steps=2))
    assert held == [already, already]


def test_data_are_checked_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "open.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Anybody?"}]}\n'
    )
    run = tiny_run(tmp_path, "out", "medusa2", held_out=(tmp_path / "open.jsonl",))
    with pytest.raises(UserError, match="nothing to learn from"):
        do(run)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_joint_recipe_does_not_overwrite_its_backbone(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "backbone", "medusa2")
    before = products(tmp_path / "backbone")
    with pytest.raises(
        UserError, match=r"medusa2 would overwrite the backbone in .*backbone: choose another --out"
    ):
        do(run)
    assert products(tmp_path / "backbone") == before
