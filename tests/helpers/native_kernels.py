"""The matmul kernels and the team of threads, called through ctypes for tests."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa_chat.native import build

if TYPE_CHECKING:
    from pathlib import Path

FLOAT32, BFLOAT16, INT8, NF4 = range(4)
FORMATS = (FLOAT32, BFLOAT16, INT8, NF4)
TILE = 32
KERNEL_PARTS = ("dispatch", "pack", "matmul_*", "team")
CHOICE_PARTS = ("choose", "choice_range", "candidates", "*operations")

NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


class Matrix(ctypes.Structure):
    """mc_matrix."""

    _fields_ = (
        ("format", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


def library_path() -> Path:
    """Build the library if its sources changed; returns its path."""
    return build.build(build.LIBRARY_FOLDER)


@cache
def library() -> ctypes.CDLL:
    """Load the kernels; MEDUSA_CHAT_TEST_LIBRARY names another library, one of zig's say."""
    loaded = ctypes.CDLL(os.environ.get("MEDUSA_CHAT_TEST_LIBRARY") or str(library_path()))
    loaded.mc_packed_bytes.restype = ctypes.c_size_t
    loaded.mc_rows_bytes.restype = ctypes.c_size_t
    loaded.mc_variant.restype = ctypes.c_char_p
    loaded.mc_variants.restype = ctypes.c_char_p
    loaded.mc_team_new.restype = ctypes.c_void_p
    return loaded


def variants() -> list[str]:
    """Name the variants that this processor can run; the best is last."""
    names: list[str] = library().mc_variants().decode().split()
    return names


def use(variant: str) -> None:
    """Switch to a variant."""
    assert library().mc_use(variant.encode()) == 0


def aligned(size: int) -> Any:
    """Allocate bytes on a cache line, filled with what must not be read."""
    memory = np.full(size + 64, 0xFF, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    """Point to an array's first element."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@dataclass
class Packed:
    """A packed matrix and what keeps its memory alive."""

    format: int
    outputs: int
    inputs: int
    memory: np.ndarray
    bias: np.ndarray | None = None

    @property
    def matrix(self) -> Matrix:
        """Fill mc_matrix."""
        return Matrix(
            self.format, self.outputs, self.inputs, pointer(self.memory), pointer(self.bias)
        )


def empty(kind: int, outputs: int, inputs: int) -> Packed:
    """Allocate the packed form."""
    size = library().mc_packed_bytes(kind, outputs, inputs)
    assert size > 0
    return Packed(kind, outputs, inputs, aligned(size))


def pack(
    kind: int, weights: np.ndarray, bias: np.ndarray | None = None, step: int = 1 << 30
) -> Packed:
    """Pack weights [outputs, inputs] (uint16 holds bfloat16), `step` rows a call."""
    outputs, inputs = weights.shape
    packed = empty(kind, outputs, inputs)
    packed.bias = bias
    source = BFLOAT16 if weights.dtype == np.uint16 else FLOAT32
    for first in range(0, outputs, step):
        part = np.ascontiguousarray(weights[first : first + step])
        library().mc_pack(
            kind, outputs, inputs, first, len(part), pointer(part), source, pointer(packed.memory)
        )
    return packed


def prepare(kind: int, x: np.ndarray, splits: tuple[int, ...] = ()) -> Any:
    """Prepare rows [rows, inputs], in parts that end at `splits`."""
    rows, inputs = x.shape
    prepared = aligned(library().mc_rows_bytes(kind, rows, inputs))
    stride = ctypes.c_size_t(x.strides[0] // x.itemsize)
    bounds = [0, *splits, rows]
    for first, last in pairwise(bounds):
        library().mc_prepare_rows(
            kind, inputs, rows, first, last - first, pointer(x), stride, pointer(prepared)
        )
    return prepared


def multiply(packed: Packed, x: np.ndarray, splits: tuple[int, ...] = ()) -> Any:
    """Compute [rows, outputs], in parts that end at the tiles `splits`."""
    return multiply_prepared(packed, prepare(packed.format, x), len(x), splits)


def multiply_prepared(
    packed: Packed, prepared: np.ndarray, rows: int, splits: tuple[int, ...] = ()
) -> Any:
    """Compute [rows, outputs] from prepared rows; what lies behind a row stays as it was."""
    stride = packed.outputs + 3
    y = np.full((rows, stride), np.float32(7.5))
    matrix = packed.matrix
    bounds = [0, *(split * TILE for split in splits), packed.outputs]
    following = [*bounds[1:-1], -1]
    for (first, last), next_first in zip(pairwise(bounds), following, strict=True):
        library().mc_matmul(
            ctypes.byref(matrix),
            pointer(prepared),
            rows,
            first,
            last,
            next_first,
            pointer(y),
            ctypes.c_size_t(stride),
        )
    assert (y[:, packed.outputs :] == 7.5).all()
    return y[:, : packed.outputs].copy()


def to_bfloat16(values: np.ndarray) -> Any:
    """Round to the nearest bfloat16, ties to even, as 16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> Any:
    """Widen 16 bits to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded_weights(kind: int, weights: np.ndarray) -> Any:
    """Return the float64 weights that the packed form stands for."""
    weights = weights.astype(np.float32)
    if kind == BFLOAT16:
        return from_bfloat16(to_bfloat16(weights)).astype(np.float64)
    if kind == INT8:
        scale = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
        codes = np.rint(np.divide(weights, scale, out=np.zeros_like(weights), where=scale > 0))
        return codes.astype(np.float64) * scale
    if kind == NF4:
        codes, absmax = nf4_codes(weights)
        return nf4_weights(codes, absmax)
    return weights.astype(np.float64)


def nf4_codes(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize as bitsandbytes does: codes [outputs, inputs], absmax [outputs, inputs / 64]."""
    outputs, inputs = weights.shape
    blocks = weights.reshape(outputs, inputs // 64, 64)
    absmax = np.abs(blocks).max(axis=2)
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    middles = (NF4_VALUES[:-1] + NF4_VALUES[1:]) / np.float32(2)
    codes = np.searchsorted(middles, blocks * inverse[..., None], side="left")
    return codes.reshape(outputs, inputs).astype(np.uint8), absmax


def nf4_weights(codes: np.ndarray, absmax: np.ndarray) -> Any:
    """Return the weights that the kernel multiplies with: values of 112 levels times absmax."""
    values = np.rint(NF4_VALUES * np.float32(112)).astype(np.float64) / 112
    return values[codes] * np.repeat(absmax.astype(np.float64), 64, axis=1)


def rounded_rows(kind: int, x: np.ndarray) -> Any:
    """Return the float64 activations that the prepared form stands for."""
    x = x.astype(np.float32)
    if kind == BFLOAT16:
        return from_bfloat16(to_bfloat16(x)).astype(np.float64)
    if kind in (INT8, NF4):
        blocks = range(0, x.shape[1], 64)
        return np.concatenate([_rounded_block(x[:, i : i + 64]) for i in blocks], axis=1)
    return x.astype(np.float64)


def _rounded_block(block: np.ndarray) -> Any:
    levels = np.float32(127)
    most = np.abs(block).max(axis=1, keepdims=True)
    inverse = np.divide(levels, most, out=np.zeros_like(most), where=most >= 1e-30)
    return np.rint(block * inverse).astype(np.float64) * np.where(most >= 1e-30, most / levels, 0)


def reference(kind: int, weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 product and the sum of the magnitudes of its terms."""
    rows = rounded_rows(kind, x)
    rounded = rounded_weights(kind, weights)
    return rows @ rounded.T, np.abs(rows) @ np.abs(rounded).T
