"""Writing heads, tensor by tensor as a layout names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa_chat.files import replacing
from medusa_chat.hub.file_names import HEADS_FILE
from medusa_chat.model.layouts.names import NAMINGS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from medusa_chat.model.heads import MedusaHeads


def write_heads(heads: MedusaHeads, folder: Path) -> Path:
    """Write heads in the official layout as bfloat16 safetensors; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / HEADS_FILE
    tensors = {
        name: t.to(torch.bfloat16).contiguous().cpu()
        for name, t in named_tensors(heads, "official")
    }
    with replacing(file) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    return file


def named_tensors(
    heads: MedusaHeads, naming: str, lm_head: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of heads by the names of NAMINGS[naming].

    Args:
        lm_head: [V, hidden], the backbone's: heads that share it get a copy each.
    """
    names = NAMINGS[naming]
    for head in range(heads.heads):
        for layer in range(heads.layers):
            yield names.block_name(head, layer, "weight"), heads.weight[layer, head].detach()
            yield names.block_name(head, layer, "bias"), heads.bias[layer, head].detach()
        if heads.lm_heads is not None:
            yield names.lm_head_name(head, heads.layers), heads.lm_heads[head].detach()
        elif lm_head is not None:
            yield names.lm_head_name(head, heads.layers), lm_head.clone()
