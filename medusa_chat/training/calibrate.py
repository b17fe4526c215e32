"""`medusa-chat calibrate`: how often each head's likeliest guesses are right along the model's own greedy text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from medusa_chat.config import Message, Sampling
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.tuning import Accuracy
from medusa_chat.prompts import Prompt

WIDTH = 20  # guesses of a head that are ranked


def calibrate(
    engine: Engine, prompts: list[Prompt], max_new_tokens: int = 128, progress: Callable[[int, int], None] | None = None
) -> Accuracy:
    """Top-1 to top-WIDTH accuracy of every head over the replies to the prompts' first two turns."""
    hits = torch.zeros(engine.heads, WIDTH, dtype=torch.long)
    tested = torch.zeros(engine.heads, dtype=torch.long)
    sampling = Sampling(mode="greedy", max_new_tokens=max_new_tokens)
    for done, prompt in enumerate(prompts, 1):
        messages: list[Message] = []
        for turn in prompt.turns[:2]:
            messages.append({"role": "user", "content": turn})
            ids = engine.encode(messages)
            if len(ids) + 2 >= engine.context:
                break
            steps = list(engine.generate(ids, sampling))
            reply = [token.id for step in steps for token in step.tokens]
            _count(engine, ids, reply, hits, tested)
            messages.append({"role": "assistant", "content": "".join(step.text for step in steps)})
        if progress:
            progress(done, len(prompts))
    accuracy = hits.cumsum(1) / tested[:, None].clamp(min=1)
    return tuple(tuple(row) for row in accuracy.tolist())


@torch.inference_mode()
def _count(engine: Engine, prompt: list[int], reply: list[int], hits: torch.Tensor, tested: torch.Tensor) -> None:
    """Rank the reply's tokens among the guesses that the heads make along it. hits: [K, WIDTH], tested: [K]"""
    assert engine.runner.heads is not None
    backbone = engine.backbone
    text = torch.tensor(prompt + reply, device=backbone.device)
    hidden = backbone.hidden_of_text(text)[len(prompt) - 1 :]  # from where the reply's first token is chosen
    guesses = engine.runner.heads.logits(hidden, backbone.lm_head).topk(min(WIDTH, backbone.vocabulary)).indices.cpu()
    answers = torch.tensor(reply)
    for head in range(engine.heads):
        right = answers[head + 1 :]  # the reply's token i + head + 1 is guessed after its token i was chosen
        found = guesses[head, : len(right)] == right[:, None]
        hits[head, : found.shape[1]] += found.sum(0)
        tested[head] += len(right)


def write_accuracy(accuracy: Accuracy, file: Path, source: str) -> None:
    """Write the figures where the tree tuner reads them, whole or not at all."""
    rows = [[round(value, 5) for value in row] for row in accuracy]
    meaning = "accuracy[k][i]: the model's own greedy token is among the likeliest i + 1 guesses of head k + 1"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"source": source, "meaning": meaning, "accuracy": rows}) + "\n", encoding="utf-8")
    os.replace(temporary, file)
