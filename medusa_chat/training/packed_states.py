"""Last hidden states of packed rows, whose documents do not see one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medusa_chat.model.attention.tree_attention import additive
from medusa_chat.model.backbone import FULL, may_be_recurrent


def hidden_states(backbone: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Run packed rows through a transformers causal LM, without its LM head.

    Args:
        backbone: the model.
        ids: [rows, length].
        positions: [rows, length]; 0 begins a document.

    Returns:
        [rows, length, hidden]
    """
    masks: dict[str, Any] = {}
    if may_be_recurrent(type(backbone)):
        dtype = backbone.get_input_embeddings().weight.dtype
        masks["attention_mask"] = {FULL: additive(within_documents(positions), dtype)[:, None]}
    output = backbone.base_model(input_ids=ids, position_ids=positions, use_cache=False, **masks)
    hidden: Tensor = output.last_hidden_state
    return hidden


def within_documents(positions: Tensor) -> Tensor:
    """Tell which token of packed rows sees which: [rows, length] -> bool [rows, length, length]."""
    places = torch.arange(positions.shape[1], device=positions.device)
    starts = places - positions
    return (starts[:, :, None] == starts[:, None]) & (places[:, None] >= places)
