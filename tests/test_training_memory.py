"""Memory that training and answering need: the forecast, the real need, and the refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.config import ModelSpec, Recipe, make_recipe
from medusa_chat.hub.model_list import packaged_file, read_models
from medusa_chat.machine import memory
from medusa_chat.machine.contents import contents_of
from medusa_chat.machine.devices import choose_dtype
from medusa_chat.training import trainer
from medusa_chat.training.distillation import distill
from medusa_chat.training.memory import (
    Needs,
    answer_needs,
    check_answers,
    check_training,
    training_needs,
)
from medusa_chat.training.optimization import MedusaTrainer
from medusa_chat.training.questions import DistillJob
from tests.helpers.complaints import complaint, refusal
from tests.helpers.tiny import random_model, save_model
from tests.helpers.tiny_runs import backbone_folder, do, tiny_run

if TYPE_CHECKING:
    from pathlib import Path

GB = 10**9
SHIPPED = read_models(packaged_file())
VICUNA = contents_of(SHIPPED["vicuna-7b"])
assert VICUNA is not None


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes of each device; change it."""
    found = {"cpu": 10**15, "cuda": 10**15}
    monkeypatch.setattr(memory, "free_memory", lambda device: found[device])
    return found


def forecast(
    spec: ModelSpec, recipe: Recipe, device: str = "cpu", width: int = 2, heads: int | None = None
) -> Needs:
    contents = contents_of(spec)
    assert contents is not None
    return training_needs(contents, recipe, device, width, heads)


def held(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- the forecast ----


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "llama-wide-heads"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("medusa1", {"lm_heads": "own"}),
        ("medusa1", {"lm_heads": "shared", "layers": 2}),
        ("medusa1", {}),
        ("medusa2", {}),
        ("distilled", {"lora_rank": 5}),
        ("medusa2", {"lora_rank": 0, "lm_heads": "own"}),
        ("medusa1", {"lm_heads": "own", "parent_bias": 3}),
        ("medusa1", {"lm_heads": "own", "parent_bias": 3, "head_vocabulary": 50}),
        ("medusa1", {"lm_heads": "shared", "parent_bias": 2, "head_vocabulary": 50}),
        ("medusa2", {"lm_heads": "auto", "head_vocabulary": 20}),
    ],
    ids=str,
)
def test_a_run_holds_as_much_as_forecast(
    kind: str, name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    plain = MedusaTrainer.train

    def train(self: MedusaTrainer, **settings: Any) -> Any:
        seen.append(self)
        return plain(self, **settings)

    monkeypatch.setattr(MedusaTrainer, "train", train)
    width = choose_dtype(torch.device("cpu"), None).itemsize
    folder = backbone_folder(tmp_path / "backbone", kind)
    run = tiny_run(tmp_path, "out", name, max_steps=2, heads_first=0.0, **changes)
    do(run)
    parameters = list(seen[0].model.parameters())
    moments = [
        state[key]
        for state in seen[0].optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    parts = forecast(ModelSpec("tiny", str(folder)), run.recipe, width=width)["cpu"]
    assert parts["weights"] == held(parameters)
    assert parts["Adam's moments"] == held(moments)
    if "gradients" in parts:
        assert parts["gradients"] == held(
            parameter for parameter in parameters if parameter.requires_grad
        )
    else:
        assert parts["the copy that is written"] == 4 * sum(
            p.numel() for p in random_model(kind, 320).parameters()
        )


@pytest.mark.parametrize("name", ["medusa1", "medusa2"])
@pytest.mark.parametrize("vocabulary", [0, 50])
def test_given_heads_with_a_new_bias_are_frozen_or_trained(
    name: str, vocabulary: int, tmp_path: Path
) -> None:
    do(tiny_run(tmp_path, "first", max_steps=1, lm_heads="own", head_vocabulary=vocabulary))
    spec = ModelSpec("tiny", str(tmp_path / "backbone"), heads=str(tmp_path / "first"))
    contents = contents_of(spec)
    assert contents is not None
    rows = vocabulary or 320
    assert contents.heads == 2 * (32 * 33 + rows * 32)
    plain, recipe = (make_recipe(name, parent_bias=rank) for rank in (0, 4))
    needs = [training_needs(contents, each, "cuda", 2, contents.heads) for each in (plain, recipe)]
    before, after = (each["cuda"] for each in needs)
    bias = 4 * (2 * rows + (vocabulary > 0))
    assert after["weights"] - before["weights"] == 4 * bias
    trained = bias - (contents.heads if name == "medusa1" else 0)
    assert after["gradients"] - before["gradients"] == 4 * trained
    again = replace(contents, heads=contents.heads + bias, parent_bias=bias)  # they have it now
    assert training_needs(again, recipe, "cuda", 2, again.heads) == training_needs(
        again, plain, "cuda", 2, again.heads
    )


def test_quantized_backbones_and_given_heads() -> None:
    spec, recipe = (
        SHIPPED["vicuna-7b"],
        make_recipe("medusa1", quant="nf4", lm_heads="own", heads=5),
    )
    assert VICUNA is not None
    new = forecast(spec, recipe)["cpu"]
    assert new["weights"] == int(VICUNA.layers * 0.5625) + 2 * VICUNA.plain + 4 * VICUNA.heads
    assert new["Adam's moments"] == 8 * VICUNA.heads
    assert forecast(spec, make_recipe("medusa1"), heads=7)["cpu"]["gradients"] == 28
    assert forecast(spec, replace(recipe, quant="int8"))["cpu"]["weights"] - new[
        "weights"
    ] == VICUNA.layers - int(VICUNA.layers * 0.5625)


def test_the_written_copy_of_a_gpu_is_on_the_host() -> None:
    needs = forecast(SHIPPED["vicuna-7b"], make_recipe("medusa2"), "cuda")
    assert "the copy that is written" not in needs["cuda"]
    assert needs["cpu"]["the copy that is written"] == pytest.approx(4 * 6.74e9, rel=0.01)
    frozen = forecast(SHIPPED["vicuna-7b"], make_recipe("medusa1"), "cuda")
    assert sum(frozen["cpu"].values()) < 6 * GB


# ---- the message ----


def test_the_line_has_the_parts_and_the_flags_that_help(free: dict[str, int]) -> None:
    spec, recipe = SHIPPED["vicuna-7b"], make_recipe("medusa1", lm_heads="own")
    needs = forecast(spec, recipe, "cuda")
    free["cuda"] = sum(needs["cuda"].values()) - GB // 2

    def line(**changes: Any) -> str:
        return refusal(check_training, spec, replace(recipe, **changes), "cuda", 2, False)

    assert line().startswith(
        "vicuna-7b with recipe medusa1 needs 23.3 GB (15.8 GB for weights, 4.7 GB for Adam's"
        " moments, 2.4 GB for gradients, 0.4 GB for libraries, activations aside), 22.8 GB free on"
        " cuda, 0.5 GB short; --quant nf4 or --lm-heads shared would make it fit; --ignore-memory"
    )
    free["cuda"] = 6 * GB
    assert "short; --quant nf4 with --lm-heads shared would make it fit" in line()
    free["cuda"] = GB
    assert "short; nothing that medusa-chat can change would make it fit" in line()
    free["cuda"] = 80 * GB
    assert "short; --lora-rank 32 would make it fit" in line(name="medusa2", lora_rank=0)
    free |= {"cuda": 80 * GB, "cpu": 20 * GB}
    assert "27.0 GB for the copy that is written" in line(name="medusa2")


def test_a_smaller_batch_of_answers_may_fit(free: dict[str, int]) -> None:
    assert VICUNA is not None
    free["cpu"] = sum(answer_needs(VICUNA, "cpu", 20 * 160)["cpu"].values())
    line = refusal(check_answers, SHIPPED["vicuna-7b"], "cpu", 64, 160)
    assert line.startswith("vicuna-7b with 64 replies at once needs 19.3 GB (13.5 GB for weights, ")
    assert "5.4 GB for cache" in line
    assert "short; --batch 16 would make it fit" in line
    free["cpu"] = GB
    assert "short; nothing" in refusal(check_answers, SHIPPED["vicuna-7b"], "cpu", 64, 160)


# ---- before a load ----


def test_nothing_is_loaded_or_written_if_it_does_not_fit(
    tmp_path: Path,
    free: dict[str, int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny_run(tmp_path, "out")
    (tmp_path / "prompts.txt").write_text("Say it\n")
    train = [
        "train",
        "--model",
        run.model,
        "--data",
        run.data[0],
        "--out",
        run.out,
        "--max-steps",
        2,
        "--length",
        32,
    ]
    answer = [
        "distill",
        "--model",
        run.model,
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "own.jsonl",
    ]
    free["cpu"] = 10**6
    with monkeypatch.context() as patch:
        patch.setattr("medusa_chat.training.local_model.load_pretrained", None)
        patch.setattr(trainer, "load_pretrained", None)
        assert "backbone with recipe medusa1 needs 0.5 GB (0.0 GB for weights" in complaint(
            capsys, *train
        )
        assert "backbone with 64 replies at once needs 0.5 GB" in complaint(capsys, *answer)
    # The next run replaces this file.
    assert [file.name for file in run.out.iterdir()] == ["training.json"]
    assert (tmp_path / "own.jsonl").read_text() == ""
    do(replace(run, ignore_memory=True))
    distill(
        run.model,
        [tmp_path / "prompts.txt"],
        tmp_path / "own.jsonl",
        DistillJob(1, 1, 8, 0, 0),
        ignore_memory=True,
        progress=lambda *_: None,
    )


def test_a_model_that_cannot_fit_is_refused_before_its_download(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_chat.hub.fetch.fetch", None)
    free["cpu"] = GB
    assert "vicuna-7b with recipe" in refusal(
        check_training, SHIPPED["vicuna-7b"], make_recipe("medusa1"), "cpu", 2, False
    )


def test_unknown_sizes_refuse_nothing(tmp_path: Path, free: dict[str, int]) -> None:
    free["cpu"] = 0
    save_model(tmp_path, random_model())
    (tmp_path / "config.json").write_text("{}")
    check_training(ModelSpec("a", str(tmp_path)), make_recipe("medusa1"), "cpu", 2, False)
    check_answers(ModelSpec("a", str(tmp_path)), "cpu", 1, 8)
