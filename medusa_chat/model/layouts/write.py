"""Heads written tensor by tensor as a layout names them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from medusa_chat.config import UserError
from medusa_chat.files import replacing
from medusa_chat.hub.file_names import OWN_HEADS
from medusa_chat.model.layouts.names import NAMINGS, PARENT_BIAS, TOKEN_MAP
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from medusa_chat.model.heads import MedusaHeads


def write_heads(heads: MedusaHeads, folder: Path) -> Path:
    """Write heads in the official layout as bfloat16 safetensors, in a sub-folder of `folder`.

    The vocabulary of heads and the bias by the parent's token come with them.

    Returns:
        The file.

    Raises:
        UserError: the file cannot be written.
    """
    file = folder / OWN_HEADS
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in named_tensors(heads, "official")}
    if heads.vocabulary is not None:
        tensors[TOKEN_MAP] = heads.vocabulary.tokens
    if heads.parent_bias is not None:
        matrices = (heads.parent_bias.first, heads.parent_bias.second)
        for name, matrix in zip(PARENT_BIAS, matrices, strict=True):
            tensors[name] = matrix.detach().to(torch.bfloat16)
    write_tensors(tensors, file)
    return file


def named_tensors(
    heads: MedusaHeads, naming: str, lm_head: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of heads with their names, those of blocks and LM heads.

    Args:
        heads: the heads.
        naming: key of NAMINGS.
        lm_head: [V, hidden], the backbone's; heads that share it get a copy each.
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


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors in one move, as safetensors or, for any other ending, as a pickle.

    Raises:
        UserError: the file cannot be written; nothing of it is left.
    """
    plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        with replacing(file) as temporary:
            if file.suffix == ".safetensors":
                save_file(plain, temporary, {"format": "pt"})
                temporary.chmod(0o666 & ~_umask())  # safetensors ignores the umask
            else:
                torch.save(plain, temporary)
    except (OSError, SafetensorError, RuntimeError) as error:  # of a full disk, the last two
        raise UserError(f"cannot write {file}: {reason_of(error)}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
