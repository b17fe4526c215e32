"""Training on tiny models: what is learnt from, what the loss is, and that nothing else changes."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_engine, random_backbone, random_model, save_model, tokenizer

from medusa_chat.config import Recipe, Sampling, UserError
from medusa_chat.events import TrainStep
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import read_heads
from medusa_chat.prompts import Prompt
from medusa_chat.training import losses
from medusa_chat.training.calibrate import calibrate, write_accuracy
from medusa_chat.training.data import IGNORED, Example, PackedRows, encode, read_conversations
from medusa_chat.training.distill import distill
from medusa_chat.training.trainer import train

TALK = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


def write_talks(file: Path, count: int = 40) -> Path:
    file.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(count)))
    return file


def test_only_the_assistants_tokens_are_targets() -> None:
    tok = tokenizer()
    example = encode(tok, TALK)
    trained = tok.decode([i for i, on in zip(example.ids, example.trained, strict=True) if on])
    assert trained == "Hello!<|end|>So long.<|end|>"
    assert all(encode(tok, TALK, everything=True).trained)


def test_rows_keep_documents_apart_and_lose_no_token() -> None:
    documents = [Example(list(range(10 * n, 10 * n + size)), [True] * size) for n, size in enumerate((3, 9, 4))]
    rows = PackedRows(documents, 4)
    assert rows.ids.flatten().tolist() == [i for d in documents for i in d.ids]
    assert rows.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    labels = [rows[i]["labels"].tolist() for i in range(4)]
    assert labels[0] == [IGNORED, 1, 2, IGNORED]  # the first token of a document follows from nothing


def test_head_targets_stop_at_the_end_of_a_document() -> None:
    labels = torch.tensor([[0, 1, 2, 3, 10, 11, 12]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    assert losses.head_targets(labels, positions, 1).tolist() == [[2, 3, IGNORED, IGNORED, 12, IGNORED, IGNORED]]
    assert losses.head_targets(labels, positions, 2).tolist() == [[3] + [IGNORED] * 6]


@pytest.mark.parametrize("own", [False, True])
def test_heads_loss_equals_plain_arithmetic_and_reaches_every_head(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, vocabulary, decay = 8, 13, 0.8
    heads = MedusaHeads(3, 2, hidden, vocabulary if own else None).double()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    lm_head = torch.nn.Linear(hidden, vocabulary, bias=False).double()
    states = torch.randn(2, 9, hidden, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (2, 9))
    labels[0, :3] = IGNORED
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 0, 1, 2, 3, 4]])

    def plain() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(3):
            terms = []
            for row in range(2):
                for t in range(9 - k - 2):
                    target = int(labels[row, t + k + 2])
                    if target == IGNORED or positions[row, t + k + 2] != positions[row, t] + k + 2:
                        continue
                    x = states[row, t]
                    for layer in range(2):
                        x = x + torch.nn.functional.silu(heads.weight[layer, k] @ x + heads.bias[layer, k])
                    logits = (heads.lm_heads[k] if heads.lm_heads is not None else lm_head.weight) @ x
                    terms.append(-torch.log_softmax(logits, -1)[target])
            total = total + decay ** (k + 1) * torch.stack(terms).mean()
        return total

    expected = plain()
    gradients = torch.autograd.grad(expected, list(heads.parameters()))
    for size in (8192, 3):  # whole, and in chunks
        monkeypatch.setattr(losses, "CHUNK", size)
        found = losses.heads_loss(heads, lm_head, states, labels, positions, decay)
        assert math.isclose(found.total.item(), expected.item(), rel_tol=1e-5)
        for a, b in zip(torch.autograd.grad(found.total, list(heads.parameters())), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            assert (a.abs().amax(dim=tuple(range(a.dim()))[2 if a.dim() > 3 else 1 :]) > 0).all()


def folder_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def backbone_folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "backbone", random_model("llama", 320, pad_token_id=259, eos_token_id=259))


def test_training_learns_and_leaves_the_backbone_alone(tmp_path: Path, backbone_folder: Path) -> None:
    before = folder_hash(backbone_folder)
    seen: list[TrainStep] = []
    recipe = Recipe(heads=2, layers=2, max_steps=30, length=32, batch_size=4, learning_rate=0.02, warmup_steps=2)
    file = train(str(backbone_folder), [write_talks(tmp_path / "d.jsonl")], tmp_path / "out", recipe, seen.append)
    heads = read_heads(file, 32, 320)
    assert (heads.heads, heads.layers, heads.lm_heads) == (2, 2, None)
    assert folder_hash(backbone_folder) == before
    assert seen[-1].step == 30
    assert all(last < first for first, last in zip(seen[0].head_loss, seen[-1].head_loss, strict=True))


def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medusa_chat.training import trainer as module

    plain = module._arguments

    def saving(run: Path, recipe: Recipe) -> Any:
        arguments = plain(run, recipe)
        arguments.save_steps = 4
        return arguments

    class Cut(Exception):
        pass

    def cut(step: TrainStep) -> None:
        if step.step >= 10:
            raise Cut

    monkeypatch.setattr(module, "_arguments", saving)
    data = [write_talks(tmp_path / "d.jsonl")]
    recipe = Recipe(heads=2, max_steps=12, length=32, batch_size=2, warmup_steps=2)
    whole = train(str(backbone_folder), data, tmp_path / "whole", recipe, lambda step: None)
    with pytest.raises(Cut):
        train(str(backbone_folder), data, tmp_path / "cut", recipe, cut)
    resumed = train(str(backbone_folder), data, tmp_path / "cut", recipe, lambda step: None, resume=True)
    assert whole.read_bytes() == resumed.read_bytes()


def test_bad_data_and_recipes_are_user_errors(tmp_path: Path, backbone_folder: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": [{"role": "cat"}]}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        train(str(backbone_folder), [bad], tmp_path / "out", Recipe(), lambda step: None)
    with pytest.raises(UserError, match="unknown recipe"):
        train(str(backbone_folder), [bad], tmp_path / "out", Recipe(name="medusa9"), lambda step: None)
    with pytest.raises(UserError, match="fewer than one row"):
        data = [write_talks(tmp_path / "d.jsonl", 1)]
        train(str(backbone_folder), data, tmp_path / "out", Recipe(length=4096), lambda step: None)


def test_share_gpt_is_read(tmp_path: Path) -> None:
    file = tmp_path / "share.json"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    file.write_text(json.dumps([{"conversations": turns}]))
    assert list(read_conversations(file)) == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    ]


def run_distill(folder: Path, prompts: Path, out: Path, batch: int = 2) -> None:
    distill(str(folder), [prompts], out, limit=None, turns=2, batch=batch, max_new_tokens=5, temperature=0.7, seed=3,
            progress=lambda done, total: None)  # fmt: skip


def test_distill_answers_in_the_models_own_words_and_resumes(tmp_path: Path, backbone_folder: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"Say {n}", "More"][: 1 + n % 2]}) + "\n" for n in range(5)))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_distill(backbone_folder, prompts, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert [len(json.loads(line)["messages"]) for line in lines] == [2, 4, 2, 4, 2]
    cut.write_bytes(b"".join(lines[:3]) + lines[3][:9])  # as if the power had gone in the fourth line, within a batch
    run_distill(backbone_folder, prompts, cut)
    assert cut.read_bytes() == whole.read_bytes()


def test_calibrate_counts_what_the_heads_get_right(tmp_path: Path) -> None:
    from medusa_chat.decoding.tuning import read_accuracy

    backbone = random_backbone("llama", 320)
    # Untrained heads that share the LM head repeat its own token, so head 1 is right where a token comes twice.
    engine = make_engine(backbone, MedusaHeads(2, 1, backbone.hidden_size))
    prompts = [Prompt("t", ("Hi there",)), Prompt("t", ("Bye", "So long"))]
    accuracy = calibrate(engine, prompts, max_new_tokens=24)
    right = tested = 0
    for prompt in prompts:
        messages: list[Any] = []
        for turn in prompt.turns:
            messages.append({"role": "user", "content": turn})
            steps = list(engine.generate(messages, Sampling(max_new_tokens=24)))
            ids = [t.id for s in steps for t in s.tokens]
            right += sum(a == b for a, b in pairwise(ids))
            tested += len(ids) - 1
            messages.append({"role": "assistant", "content": "".join(s.text for s in steps)})
    assert accuracy[0][0] == pytest.approx(right / tested)
    assert all(list(row) == sorted(row) for row in accuracy)
    file = tmp_path / "head_accuracy.json"
    write_accuracy(accuracy, file, "test")
    read = read_accuracy(file)
    assert read is not None
    assert read[0][0] == pytest.approx(accuracy[0][0], abs=1e-5)
