"""Weights of a GGUF file as tensors of a transformers model, unpacked when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from medusa_chat.hub.gguf.header import Header, TensorInfo

FIELDS = ("weight", "bias")
# Of other use than as weights: tables for rotary positions.
TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class LazyTensor:
    """A tensor that is read and unpacked by `[...]`, as safetensors' slices are."""

    def __init__(self, info: TensorInfo, change: Callable[[Tensor], Tensor]) -> None:
        self._info = info
        self._change = change
        self.shape = torch.Size(info.shape)

    def __getitem__(self, _: Any) -> Tensor:
        info = self._info
        data = np.fromfile(info.file, np.uint8, info.size, offset=info.start)
        rows = data.reshape(*info.shape[:-1], -1)
        plain = torch.from_numpy(dequantize(rows, GGMLQuantizationType[info.type]))
        return self._change(plain.reshape(info.shape))

    def get_dtype(self) -> str:
        """Return safetensors' name of the number format that `[...]` gives."""
        return "F32"

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)


def state_dict_of(header: Header, config: Any, names: list[str]) -> dict[str, LazyTensor]:
    """Find the tensors of a model's parameters.

    Args:
        header: of the file.
        config: transformers' config of its text part.
        names: of the model's parameters.

    Returns:
        The tensors by parameter, and those that no parameter has under their own names.
    """
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    mapping = get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, LazyTensor] = {}
    left = dict(header.tensors)
    for name in names:
        parameter, _, field = name.rpartition(".")
        place = mapping.get_name(parameter) if field in FIELDS else None
        info = left.pop(f"{place}.{field}", None)
        if info is not None:
            found[name] = LazyTensor(info, _change(header.architecture, name, config))
    for name, info in left.items():
        if name not in TABLES:
            found[name] = LazyTensor(info, _as_it_is)
    return found


def _change(family: str, name: str, config: Any) -> Callable[[Tensor], Tensor]:
    """Return what undoes llama.cpp's changes of a parameter."""
    if family == "llama" and ".q_proj." in name:
        return _unpermuted(config.num_attention_heads)
    if family == "llama" and ".k_proj." in name:
        return _unpermuted(config.num_key_value_heads)
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return _less_one
    return _as_it_is


def _unpermuted(heads: int) -> Callable[[Tensor], Tensor]:
    """Bring the halves of Llama's rotary pairs, which llama.cpp interleaves, apart again."""

    def change(weight: Tensor) -> Tensor:
        pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)

    return change


def _less_one(weight: Tensor) -> Tensor:
    """Return Gemma's norm without the 1 that its model adds."""
    return weight - 1


def _as_it_is(weight: Tensor) -> Tensor:
    return weight
