"""Perplexity of a backbone on held-out text, to see what training has done to it."""

from __future__ import annotations

import math
from typing import Any

import torch

from medusa_chat.training.data import IGNORED, PackedRows
from medusa_chat.training.entropy import cross_entropy
from medusa_chat.training.lm_heads import output_layer
from medusa_chat.training.losses import head_targets
from medusa_chat.training.packed_states import hidden_states


@torch.inference_mode()
def perplexity(backbone: Any, rows: PackedRows, batch: int = 8) -> float:
    """Exponential of the mean cross entropy of a transformers causal LM over all targets."""
    training = backbone.training
    backbone.eval()
    lm_head = output_layer(backbone)
    total = 0.0
    count = 0
    for start in range(0, len(rows), batch):
        items = [rows[i] for i in range(start, min(start + batch, len(rows)))]
        ids, positions, labels = (
            torch.stack([item[key] for item in items]).to(backbone.device)
            for key in ("input_ids", "position_ids", "labels")
        )
        targets = head_targets(labels, positions, 0)
        answered = targets != IGNORED
        hidden = hidden_states(backbone, ids, positions)[answered]
        total += float(cross_entropy(hidden, targets[answered], lm_head))
        count += int(answered.sum())
    backbone.train(training)
    return math.exp(total / max(count, 1))
