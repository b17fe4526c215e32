"""Perplexity of a backbone on held-out text, so that training it with heads cannot make it worse unseen."""

from __future__ import annotations

import math
from typing import Any

import torch

from medusa_chat.training.data import IGNORED, PackedRows
from medusa_chat.training.losses import cross_entropy, head_targets, output_layer


@torch.inference_mode()
def perplexity(backbone: Any, rows: PackedRows, batch: int = 8) -> float:
    """Exp of the mean cross entropy over all targets of `rows`; `backbone` is a transformers causal LM."""
    was, device = backbone.training, backbone.device
    backbone.eval()
    total, count, lm_head = 0.0, 0, output_layer(backbone)
    for start in range(0, len(rows), batch):
        items = [rows[i] for i in range(start, min(start + batch, len(rows)))]
        ids, positions, labels = (
            torch.stack([item[key] for item in items]).to(device)
            for key in ("input_ids", "position_ids", "labels")
        )
        output = backbone.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        targets = head_targets(labels, positions, 0)
        answered = targets != IGNORED
        total += float(
            cross_entropy(output.last_hidden_state[answered], targets[answered], lm_head)
        )
        count += int(answered.sum())
    backbone.train(was)
    return math.exp(total / max(count, 1))
