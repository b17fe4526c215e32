"""Packed weights, as the library reads them, of linear layers: plain or bitsandbytes' own."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_float
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa_chat.native.library import NotFiniteError, UnavailableError, load
from medusa_chat.native.structures import BFLOAT16, FLOAT32, FORMATS, INT8, NF4, Matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.native.kept import KeptMatrices

NF4_BLOCK = 64
CHUNK = 256  # outputs that a thread packs at a time


@dataclass(frozen=True)
class Rows:
    """Some rows of the matrix of a linear layer, plain or of bitsandbytes."""

    linear: Any
    first: int
    count: int

    @property
    def bias(self) -> Tensor | None:
        """Their biases: [count]."""
        bias = self.linear.bias
        return None if bias is None else bias.detach()[self.first : self.first + self.count]


class Store:
    """Owns the tensors that the library points to.

    Attributes:
        packed: matrices that were packed anew or read from a file, in order.
        all_read: none had to be packed.
    """

    def __init__(self, read: KeptMatrices | None = None) -> None:
        """`read`: matrices that a file keeps, in the order in which they will be asked for."""
        self._kept: list[Any] = []
        self._read = read
        self.packed: list[Tensor] = []
        self.all_read = read is not None

    def keep(self, tensor: Tensor) -> int:
        """Keep a tensor and return its address."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor) -> int:
        """Keep a tensor in float32 and return its address."""
        return self.keep(tensor.detach().float())

    def read(self, size: int) -> Tensor | None:
        """Return the next matrix of the file; None if it has to be packed."""
        matrix = self._read.take(size) if self._read else None
        if matrix is None:
            self._read, self.all_read = None, False
        return matrix

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that are kept."""
        return sum(tensor.nbytes for tensor in self._kept)


def all_rows(linear: Any) -> Rows:
    """Every row of a layer's matrix."""
    return Rows(linear, 0, linear.out_features)


def pack(parts: Sequence[Rows], weights: str, store: Store) -> Matrix:
    """One packed matrix of the parts' rows, one below the other."""
    library = load()
    known = _own_format(parts[0].linear)
    outputs, inputs = sum(part.count for part in parts), parts[0].linear.in_features
    number = _format_for(weights, inputs) if known is None else known
    size = library.mc_packed_bytes(number, outputs, inputs)
    if any(_own_format(part.linear) != known for part in parts) or not size:
        raise UnavailableError(f"the native step can't pack a matrix [{outputs}, {inputs}] so")
    packed = store.read(size)
    if packed is None:
        packed = torch.zeros(size, dtype=torch.uint8)
        first = 0
        for part in parts:
            check_finite(part.linear.weight)
            _PACKERS[known](part, number, outputs, first, packed.data_ptr())
            first += part.count
    store.packed.append(packed)
    bias = None
    if parts[0].bias is not None:
        bias = store.floats(torch.cat([part.bias for part in parts if part.bias is not None]))
    return Matrix(number, outputs, inputs, store.keep(packed), bias)


def pack_some(matrix: Matrix, rows: Tensor, store: Store) -> Matrix:
    """Copy some rows of a packed matrix, and of its bias: rows int32 [n]."""
    size = load().mc_packed_bytes(matrix.format, len(rows), matrix.inputs)
    packed = torch.zeros(size, dtype=torch.uint8)
    if load().mc_pack_rows(byref(matrix), rows.data_ptr(), len(rows), packed.data_ptr()):
        raise UnavailableError("the heads rank tokens that the LM head does not have")
    bias = None
    if matrix.bias:
        whole = torch.tensor((c_float * matrix.outputs).from_address(matrix.bias))
        bias = store.floats(whole[rows])
    return Matrix(matrix.format, len(rows), matrix.inputs, store.keep(packed), bias)


def check_finite(weight: Tensor) -> None:
    """Refuse NaN and infinity, which packed integers would hide."""
    if weight.is_floating_point() and not all(bool(end.isfinite()) for end in weight.aminmax()):
        raise NotFiniteError


def _format_for(weights: str, inputs: int) -> int:
    """Return the format for a plain matrix: int8 in place of nf4 where rows end inside a block."""
    number = FORMATS[weights]
    return INT8 if number == NF4 and inputs % NF4_BLOCK else number


def _own_format(linear: Any) -> int | None:
    """The format that a quantized layer has already; None for a plain one."""
    kind = type(linear).__name__
    if kind == "Linear8bitLt":
        return INT8
    if kind == "Linear4bit":
        return NF4
    if type(linear) is nn.Linear:
        return None
    raise UnavailableError(f"the native step can't read layers of the kind {kind}")


def _pack_plain(part: Rows, number: int, outputs: int, first: int, packed: int) -> None:
    weight = part.linear.weight.detach()[part.first : part.first + part.count].contiguous()
    source = FLOAT32 if weight.dtype == torch.float32 else BFLOAT16

    def pack_from(start: int) -> None:
        rows = weight[start : start + CHUNK]
        inputs, address = rows.shape[1], rows.data_ptr()
        load().mc_pack(number, outputs, inputs, first + start, len(rows), address, source, packed)

    # Threads may not share the 16 outputs that are packed together.
    threads = 1 if first % 16 else os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pack_from, range(0, part.count, CHUNK)))


def _pack_int8(part: Rows, _number: int, outputs: int, first: int, packed: int) -> None:
    """Pack a layer of LLM.int8(); its codes and scales move when it first runs."""
    layer, rows = part.linear, slice(part.first, part.first + part.count)
    used = layer.weight if layer.weight.SCB is not None else layer.state
    codes, scales = (
        layer.weight.data[rows].contiguous(),
        (used.SCB[rows] / 127).float().contiguous(),
    )
    check_finite(scales)
    addresses = codes.data_ptr(), scales.data_ptr()
    load().mc_pack_int8(outputs, layer.in_features, first, part.count, *addresses, packed)


def _pack_nf4(part: Rows, _number: int, outputs: int, first: int, packed: int) -> None:
    """Pack a 4-bit layer of bitsandbytes: two codes a byte; nested statistics are made plain."""
    layer, state = part.linear, part.linear.weight.quant_state
    if state.quant_type != "nf4" or state.blocksize != 64 or layer.in_features % 64:
        raise UnavailableError(
            f"the native step can't read {state.quant_type} in {state.blocksize}s"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise UnavailableError("the native step can't read weights that bitsandbytes has packed")
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    wide = absmax.float().view(-1, layer.in_features // 64)[part.first : part.first + part.count]
    codes = layer.weight.data.view(torch.uint8).view(-1, layer.in_features // 2)
    codes = codes[part.first : part.first + part.count].contiguous()
    wide = wide.contiguous()
    check_finite(wide)
    addresses = codes.data_ptr(), wide.data_ptr()
    load().mc_pack_nf4(outputs, layer.in_features, first, part.count, *addresses, packed)


_PACKERS = {None: _pack_plain, INT8: _pack_int8, NF4: _pack_nf4}
