"""The small operations of a layer as Triton kernels, which round where `plain` rounds."""
# No `from __future__ import annotations`: Triton evaluates the annotations. It has none for
# tensors and numbers, and names constants in upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, SIM108

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_chat.model.fused.plain import Activation, CacheRows, NormKind, Turn

GATE_BLOCK = 1024  # numbers of a program
WIDE_ROW = 2048  # numbers of a row that takes eight warps


def norm(rows: Tensor, weight: Tensor, eps: float, kind: NormKind) -> Tensor:
    """Compute `plain.norm`, a row in each program."""
    inner, size = rows.shape[-2:]
    groups = rows.reshape(-1, inner, size)  # heads of rows are views into a wider product
    made = rows.new_empty(rows.shape)
    with torch.cuda.device_of(rows):
        _norm[len(groups) * inner,](
            (groups, groups.stride(0), groups.stride(1)),
            weight,
            made,
            eps,
            inner,
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
            GEMMA=kind == "gemma",
            num_warps=8 if size > WIDE_ROW else 4,
        )
    return made


@triton.jit(do_not_specialize=["eps", "inner"])
def _norm(
    rows,
    weight,
    made,
    eps,
    inner,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = rows[0] + row // inner * rows[1] + row % inner * rows[2]
    at = tl.arange(0, BLOCK)
    held = at < SIZE
    number = made.dtype.element_ty
    exact = tl.load(source + at, mask=held, other=0.0).to(tl.float32)
    exact = exact * tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + eps)
    scale = tl.load(weight + at, mask=held, other=0.0).to(tl.float32)
    if GEMMA:
        scaled = exact * (1.0 + scale)
    else:
        scaled = exact.to(number).to(tl.float32) * scale
    tl.store(made + row * SIZE + at, scaled.to(number), mask=held)


def gate(gates: Tensor, rows: Tensor, kind: Activation) -> Tensor:
    """Compute `plain.gate`, a piece of a row in each program."""
    size = rows.shape[-1]
    flat_gates, flat_rows = gates.flatten(0, -2), rows.flatten(0, -2)
    made = rows.new_empty(rows.shape)
    with torch.cuda.device_of(rows):
        _gate[len(flat_rows), triton.cdiv(size, GATE_BLOCK)](
            (flat_gates, flat_gates.stride(0)),
            (flat_rows, flat_rows.stride(0)),
            made,
            SIZE=size,
            BLOCK=GATE_BLOCK,
            SILU=kind == "silu",
        )
    return made


@triton.jit
def _gate(gates, rows, made, SIZE: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = at < SIZE
    number = made.dtype.element_ty
    x = tl.load(gates[0] + row * gates[1] + at, mask=held, other=0.0).to(tl.float32)
    if SILU:
        active = x * tl.sigmoid(x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        active = x * tl.sigmoid(2.0 * inner)  # half of 1 + tanh(inner)
    factor = tl.load(rows[0] + row * rows[1] + at, mask=held, other=0.0).to(tl.float32)
    product = active.to(number).to(tl.float32) * factor
    tl.store(made + row * SIZE + at, product.to(number), mask=held)


def rotate(query: Tensor, new: tuple[Tensor, Tensor], turn: Turn, cache: CacheRows) -> Tensor:
    """Compute `plain.rotate`, a head of a row in each program."""
    _, heads, rows, size = query.shape
    key, value = new
    keys, values, places = cache
    kv_heads = key.shape[1]
    made = query.new_empty(1, rows, heads, size)
    cosines, sines = turn
    turned = cosines.shape[-1]
    with torch.cuda.device_of(query):
        _rotate[rows, heads + 2 * kv_heads](
            tuple((each, each.stride(1), each.stride(2)) for each in (query, key, value)),
            ((made, size, heads * size), *((c, c.stride(1), c.stride(2)) for c in (keys, values))),
            (cosines, sines, cosines.stride(1), sines.stride(1)),
            places,
            HEADS=heads,
            KV_HEADS=kv_heads,
            SIZE=size,
            HALF=turned // 2,
            BLOCK=triton.next_power_of_2(turned // 2),
            REST=triton.next_power_of_2(max(size - turned, 1)),
            COPY=triton.next_power_of_2(size),
            num_warps=1,
        )
    return made.transpose(1, 2)


@triton.jit
def _rotate(
    inputs,
    outputs,
    turn,
    places,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    COPY: tl.constexpr,
):
    """Rotate a query to its place, a key to its place in the cache; or copy a value there.

    `inputs`, `outputs`: of queries, keys and values, each a pointer, head stride, row stride.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(places + row).to(tl.int64)
    if head < HEADS:
        source = inputs[0][0] + head * inputs[0][1] + row * inputs[0][2]
        target = outputs[0][0] + head * outputs[0][1] + row * outputs[0][2]
        _turn(source, target, turn, row, SIZE, HALF, BLOCK, REST)
    elif head < HEADS + KV_HEADS:
        own = (head - HEADS).to(tl.int64)
        source = inputs[1][0] + own * inputs[1][1] + row * inputs[1][2]
        target = outputs[1][0] + own * outputs[1][1] + place * outputs[1][2]
        _turn(source, target, turn, row, SIZE, HALF, BLOCK, REST)
    else:
        own = (head - HEADS - KV_HEADS).to(tl.int64)
        source = inputs[2][0] + own * inputs[2][1] + row * inputs[2][2]
        target = outputs[2][0] + own * outputs[2][1] + place * outputs[2][2]
        at = tl.arange(0, COPY)
        tl.store(target + at, tl.load(source + at, mask=at < SIZE), mask=at < SIZE)


@triton.jit
def _turn(
    source,
    target,
    turn,
    row,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotate the first 2 * HALF numbers of a head, and copy the rest."""
    at = tl.arange(0, BLOCK)
    held = at < HALF
    number = target.dtype.element_ty
    low = tl.load(source + at, mask=held).to(tl.float32)
    high = tl.load(source + HALF + at, mask=held).to(tl.float32)
    cosines = turn[0] + row * turn[2] + at
    sines = turn[1] + row * turn[3] + at
    low_cosine = tl.load(cosines, mask=held).to(tl.float32)
    low_sine = tl.load(sines, mask=held).to(tl.float32)
    high_cosine = tl.load(cosines + HALF, mask=held).to(tl.float32)
    high_sine = tl.load(sines + HALF, mask=held).to(tl.float32)
    first = _rounded(low * low_cosine, number) - _rounded(high * low_sine, number)
    second = _rounded(high * high_cosine, number) + _rounded(low * high_sine, number)
    tl.store(target + at, first.to(number), mask=held)
    tl.store(target + HALF + at, second.to(number), mask=held)
    if SIZE > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, REST)
        tl.store(target + rest, tl.load(source + rest, mask=rest < SIZE), mask=rest < SIZE)


@triton.jit
def _rounded(x, number: tl.constexpr):
    return x.to(number).to(tl.float32)
