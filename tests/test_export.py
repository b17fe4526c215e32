"""The output of a joint run: a model that answers like the trained one, and its perplexity."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import medusa_chat
from medusa_chat.cli import main
from medusa_chat.config import ACCURACY_FILE, Message, UserError
from medusa_chat.model.templates import ChatTemplate
from medusa_chat.sampling import Sampling
from medusa_chat.training import trainer as module
from medusa_chat.training.data import PackedRows, encode, read_documents
from medusa_chat.training.evaluate import perplexity
from tests.helpers.made_trainees import made_by_runs
from tests.helpers.tiny import END, random_model, save_model, tokenizer
from tests.helpers.tiny_runs import backbone_folder, do, tiny_run, write_talks

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.training.trainee import Trainee

IDS = torch.arange(1, 40)[None]
TEMPLATE = ChatTemplate(tokenizer(), "tiny")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Trainee, Any]]:
    """What runs make, in float32 whatever the processor has."""
    monkeypatch.setattr(module, "choose_dtype", lambda *_: torch.float32)
    return made_by_runs(monkeypatch)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama-tied", {}),
        ("gemma2", {}),
        ("llama", {"lora_rank": 0}),
        ("llama-tied", {"lora_rank": 0}),
    ],
    ids=str,
)
def test_the_written_model_answers_like_the_trained_one(
    kind: str, changes: dict[str, Any], tmp_path: Path, made: list[tuple[Trainee, Any]]
) -> None:
    backbone_folder(tmp_path / "backbone", kind)
    rates = {"backbone_learning_rate": 0.01, "heads_first": 0.0}
    do(tiny_run(tmp_path, "out", "medusa2", **rates, **changes))
    before, after = (
        logits_of(
            AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        )
        for name in ("backbone", "out")
    )
    trained = logits_of(made[0][0].backbone)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, trained, rtol=1e-4, atol=1e-4)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors.keys() == load_file(tmp_path / "backbone" / "model.safetensors").keys()


def test_the_written_model_chats(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "out", "medusa2"))
    engine = medusa_chat.load(str(tmp_path / "out"), dtype="float32", tree="chain-2", probing=False)
    assert engine.heads == 2
    prompt: list[Message] = [{"role": "user", "content": "Hi"}]
    steps = engine.generate(prompt, Sampling(max_new_tokens=8, ignore_eos=True))
    assert sum(len(step.tokens) for step in steps) == 8


@pytest.mark.parametrize("told", [True, False], ids=["in the config", "in the files alone"])
def test_the_files_keep_their_precision(told: bool, tmp_path: Path) -> None:
    model = random_model("llama", 320, pad_token_id=END, eos_token_id=END).to(torch.bfloat16)
    config = save_model(tmp_path / "backbone", model) / "config.json"
    settings = json.loads(config.read_text())
    assert settings.pop("dtype") == "bfloat16"
    if not told:
        config.write_text(json.dumps(settings))
    do(tiny_run(tmp_path, "out", "medusa2"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_an_adapter_of_a_quantized_backbone_is_merged_into_full_weights(
    quant: str, tmp_path: Path
) -> None:
    backbone_folder(tmp_path / "backbone", hidden_size=64, intermediate_size=128)
    rates = {"backbone_learning_rate": 0.01, "heads_first": 0.0}
    _, said = do(tiny_run(tmp_path, "out", "medusa2", quant=quant, lora_alpha=3, **rates))
    before = load_file(tmp_path / "backbone" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-10" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"backbone.{name}.lora_{x}.default.weight"].float() for x in "AB")
    expected = before[f"{name}.weight"] + 3 / 2 * b @ a
    assert (expected - before[f"{name}.weight"]).abs().max() > 1e-3
    torch.testing.assert_close(after[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert said[-1].startswith("perplexity of the backbone on held-out text: ")


def test_accuracies_of_other_heads_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ACCURACY_FILE).write_text("{}")
    with pytest.raises(UserError, match="choose another --out"):
        do(tiny_run(tmp_path, "out"))
    assert (tmp_path / "out" / ACCURACY_FILE).read_text() == "{}"


# ---- perplexity ----


def plain_perplexity(model: Any, file: Path, length: int) -> float:
    """Exponential of the mean of -log p over the assistant's tokens, by part of a document."""
    flat = [
        (i, on, n)
        for n, d in enumerate(read_documents(file))
        for e in encode(TEMPLATE, d)
        for i, on in zip(e.ids, e.trained, strict=True)
    ]
    pieces: list[list[tuple[int, bool, int]]] = []
    for place, item in enumerate(flat):
        if place % length == 0 or item[2] != flat[place - 1][2]:
            pieces.append([])
        pieces[-1].append(item)
    terms = []
    for piece in pieces:
        with torch.no_grad():
            logits = model(torch.tensor([[i for i, *_ in piece]])).logits[0].double()
        for t, (i, on, _) in enumerate(piece[1:]):
            if on:
                shares = logits[t].exp() / logits[t].exp().sum()
                terms.append(-math.log(shares[i]))
    return math.exp(sum(terms) / len(terms))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_perplexity_is_that_of_plain_arithmetic(kind: str, tmp_path: Path) -> None:
    model = random_model(kind, 320, attention_dropout=0.3).double()
    file = write_talks(tmp_path / "talks.jsonl", 30)
    rows = PackedRows((e for d in read_documents(file) for e in encode(TEMPLATE, d)), 24)
    model.train()
    found = [perplexity(model, rows), perplexity(model, rows, batch=3)]
    assert model.training
    assert found == pytest.approx([plain_perplexity(model.eval(), file, 24)] * 2, rel=1e-6)


def test_perplexity_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "out", "medusa2")
    held_out = write_talks(tmp_path / "other.jsonl", 12, seed=5)
    asked = [
        "--model",
        run.model,
        "--data",
        str(run.data[0]),
        "--held-out",
        str(held_out),
        "--out",
        str(run.out),
    ]
    flags = "--recipe medusa2 --heads 2 --max-steps 6 --length 32 --batch-size 2"
    flags += " --backbone-learning-rate 0.01"
    assert main(["train", *asked, *flags.split(), "--warmup-steps", "1", "--heads-first", "0"]) == 0
    kept = json.loads((run.out / "training.json").read_text())["perplexity"]
    for name, folder in (("before", tmp_path / "backbone"), ("after", run.out)):
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        model.eval()
        assert kept[name] == pytest.approx(plain_perplexity(model, held_out, 32), rel=1e-3)
    assert abs(kept["before"] - kept["after"]) > 1
    told = capsys.readouterr()
    change = 100 * (kept["after"] / kept["before"] - 1)
    line = f"held-out text: {kept['before']:.3f} before, {kept['after']:.3f} after ({change:+.1f}%)"
    assert line in told.err
    assert told.out.startswith(
        f"wrote {run.out}; next: medusa-chat calibrate --model {run.out} --data FILE"
    )


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "out", "medusa2")
    write_talks(tmp_path / "talks.jsonl", 120)
    everything = list(read_documents(run.data[0]))
    trained, held_out = module.split_documents(run)
    assert len(held_out) == 3
    assert sorted(d.place for d in trained + held_out) == sorted(d.place for d in everything)
    assert not {d.place for d in trained} & {d.place for d in held_out}
    # A frozen backbone needs none.
    assert module.split_documents(tiny_run(tmp_path, "out"))[0] == everything


def test_perplexity_on_training_text_is_called_so(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "out", "medusa2", max_steps=2)
    (tmp_path / "talks.jsonl").write_text(json.dumps({"text": "the cat sat on a mat " * 40}))
    assert do(run)[1][-1].startswith("perplexity of the backbone on training text: ")
