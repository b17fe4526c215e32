"""Files of Medusa heads: structure is read from the tensors, never from a config, and no key is skipped.

Official layout (FasterDecoding/Medusa): `{h}.{l}.linear.weight` [H, H] and `.bias` [H] for block l of head h, and,
where the heads own their LM heads, `{h}.{L}.weight` [V, H].
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa_chat.config import UserError
from medusa_chat.model.heads import MedusaHeads

HEADS_FILE = "medusa_lm_head.safetensors"
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_LM_HEAD = re.compile(r"(\d+)\.(\d+)\.weight")


def read_heads(path: Path, hidden: int, vocabulary: int) -> MedusaHeads:
    """Read heads from a safetensors file and check them against the backbone.

    Raises:
        UserError: the file is missing or damaged, a key is unknown or missing, or a shape does not fit.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"cannot read the Medusa heads {path}: {error}; the file is damaged or not safetensors"
        ) from None
    blocks, own = _sorted_tensors(path, tensors)
    count = 1 + max(head for head, *_ in blocks)
    layers = 1 + max(layer for _, layer, _ in blocks)
    every = ((head, layer, kind) for head in range(count) for layer in range(layers) for kind in ("weight", "bias"))
    if absent := next((key for key in every if key not in blocks), None):
        raise UserError(f"{path}: tensor {absent[0]}.{absent[1]}.linear.{absent[2]} is missing")
    heads = MedusaHeads(count, layers, hidden, vocabulary if own else None)
    heads.to(next(iter(tensors.values())).dtype)
    for head in range(count):
        for layer in range(layers):
            for kind, stacked in (("weight", heads.weight), ("bias", heads.bias)):
                name = f"{head}.{layer}.linear.{kind}"
                _fill(path, name, blocks[head, layer, kind], stacked.data[layer, head])
        if heads.lm_heads is not None:
            _fill(path, f"{head}.{layers}.weight", own.pop((head, layers), None), heads.lm_heads.data[head])
    if own:
        raise UserError(f"{path}: LM head {'.'.join(map(str, next(iter(own))))}.weight belongs to no head")
    return heads


def _sorted_tensors(
    path: Path, tensors: dict[str, Tensor]
) -> tuple[dict[tuple[int, int, str], Tensor], dict[tuple[int, int], Tensor]]:
    """Tensors by (head, layer, kind) and own LM heads by (head, layer)."""
    blocks: dict[tuple[int, int, str], Tensor] = {}
    own: dict[tuple[int, int], Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: tensor {name} holds {str(tensor.dtype)[6:]}, not floating-point numbers")
        if block := _BLOCK.fullmatch(name):
            blocks[int(block[1]), int(block[2]), block[3]] = tensor
        elif lm_head := _LM_HEAD.fullmatch(name):
            own[int(lm_head[1]), int(lm_head[2])] = tensor
        else:
            raise UserError(f"{path}: unknown tensor {name!r}; these are no Medusa heads in a known layout")
    if not blocks:
        raise UserError(f"{path} holds no Medusa heads")
    return blocks, own


def _fill(path: Path, name: str, source: Tensor | None, target: Tensor) -> None:
    if source is None:
        raise UserError(f"{path}: tensor {name} is missing")
    if source.shape != target.shape:
        raise UserError(
            f"{path}: tensor {name} has shape {list(source.shape)}, the backbone needs {list(target.shape)};"
            " were these heads trained for another model?"
        )
    target.copy_(source)


def write_heads(heads: MedusaHeads, folder: Path) -> Path:
    """Write heads in the official layout as bfloat16 safetensors; returns the file."""
    tensors = {}
    for head in range(heads.heads):
        for layer in range(heads.layers):
            tensors[f"{head}.{layer}.linear.weight"] = heads.weight[layer, head]
            tensors[f"{head}.{layer}.linear.bias"] = heads.bias[layer, head]
        if heads.lm_heads is not None:
            tensors[f"{head}.{heads.layers}.weight"] = heads.lm_heads[head]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / HEADS_FILE
    save_file({name: t.detach().to(torch.bfloat16).contiguous().cpu() for name, t in tensors.items()}, file)
    return file
