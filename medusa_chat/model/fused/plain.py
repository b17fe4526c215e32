"""The small operations of a layer in torch, with transformers' own rounding: the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

# Llama's weight multiplies rounded numbers. Gemma's lacks 1, and all is rounded at the end.
NormKind = Literal["llama", "gemma"]
Activation = Literal["silu", "gelu_tanh"]
NORMS: tuple[NormKind, ...] = get_args(NormKind)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class Operations(Protocol):
    """The operations, in torch or as kernels."""

    def norm(self, rows: Tensor, weight: Tensor, eps: float, kind: NormKind) -> Tensor:
        """Divide rows [..., size] by their root mean square, and multiply with a weight [size]."""

    def gate(self, gates: Tensor, rows: Tensor, kind: Activation) -> Tensor:
        """Multiply rows [..., size] with their activated gates [..., size]."""

    def rotate(
        self, query: Tensor, new: tuple[Tensor, Tensor], turn: Turn, cache: CacheRows
    ) -> Tensor:
        """Rotate queries and keys by their positions, and write keys and values to the cache.

        Args:
            query: [1, heads, n, head_dim].
            new: keys and values, [1, kv_heads, n, head_dim] each.
            turn: cosines and sines, [1, n, r] each: the first r numbers of a head are rotated.
            cache: keys and values of the layer, [1, kv_heads, T, head_dim] each, and the n places
                to write.

        Returns:
            The queries, rotated.
        """


Turn = tuple["Tensor", "Tensor"]
CacheRows = tuple["Tensor", "Tensor", "Tensor"]


def norm(rows: Tensor, weight: Tensor, eps: float, kind: NormKind) -> Tensor:
    """Compute `Operations.norm`."""
    exact = rows.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if kind == "gemma":
        return (exact * (1.0 + weight.float())).to(rows.dtype)
    return weight * exact.to(rows.dtype)


def gate(gates: Tensor, rows: Tensor, kind: Activation) -> Tensor:
    """Compute `Operations.gate`."""
    if kind == "silu":
        return functional.silu(gates) * rows
    return functional.gelu(gates, approximate="tanh") * rows


def rotate(query: Tensor, new: tuple[Tensor, Tensor], turn: Turn, cache: CacheRows) -> Tensor:
    """Compute `Operations.rotate`."""
    key, value = new
    keys, values, places = cache
    keys.index_copy_(2, places, _rotated(key, turn))
    values.index_copy_(2, places, value)
    return _rotated(query, turn)


def _rotated(heads: Tensor, turn: Turn) -> Tensor:
    cosines, sines = (each.unsqueeze(1) for each in turn)
    size = cosines.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    low, high = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat([-high, low], -1) * sines
    return torch.cat([turned, rest], -1)
