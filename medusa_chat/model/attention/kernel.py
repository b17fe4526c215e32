"""Tree attention over a fixed span of the cache as a Triton kernel; `attention.plain` is its twin and its reference.

A program holds some rows of all query heads that share a key head, and walks over a part of the text's keys, so that
a key is read once for all of them, and one row of text fills a GPU. A second kernel joins the parts by their softmax
sums, as in flash decoding. What lies behind the text, or before a window, is not read.
"""
# No `from __future__ import annotations`: Triton looks at the annotations, and has none for tensors and numbers.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_chat.model.attention.tree_attention import TreeMask

BLOCK_BYTES = (
    16384  # of a block of keys: with that of values, twice in flight, and the queries, 80 KiB
)
LARGEST_BLOCK = 64  # rows, or keys
SMALLEST_BLOCK = 16  # that tl.dot takes
MOST_PARTS = 32
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """How the kernel is laid over a GPU.

    Attributes:
        programs: about how many there should be at a time; they differ in key heads, then rows, then parts of the text.
        warps: of a program; stages: blocks of keys that it has in flight.
    """

    programs: int
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        return f"{self.programs} programs, {self.warps} warps, {self.stages} stages"


def launches(multiprocessors: int) -> tuple[Launch, ...]:
    """Those worth timing on a GPU. Tiles of LARGEST_BLOCK rows and wide heads spill registers with fewer warps."""
    return (
        Launch(multiprocessors, 8, 2),
        Launch(2 * multiprocessors, 4, 2),
        Launch(2 * multiprocessors, 4, 3),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scaling: float,
    softcap: float | None = None,
    launch: Launch = Launch(128),
) -> Tensor:
    """Attention of n rows over the first `start + n` of T cached positions.

    Args:
        query: [1, heads, n, head_dim]; key, value: [1, kv_heads, T, head_dim]; all float32, bfloat16 or float16.

    Returns:
        [1, n, heads, head_dim]
    """
    _, heads, rows, size = query.shape
    kv_heads, span = key.shape[1:3]
    groups = heads // kv_heads
    query, key, value = (
        each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value)
    )
    padded = max(triton.next_power_of_2(size), SMALLEST_BLOCK)
    block = min(max(BLOCK_BYTES // (padded * query.element_size()), SMALLEST_BLOCK), LARGEST_BLOCK)
    tile = min(max(triton.next_power_of_2(groups * rows), SMALLEST_BLOCK), block)
    tiles = triton.cdiv(groups * rows, tile)
    parts = min(max(launch.programs // (tiles * kv_heads), 1), triton.cdiv(span, block), MOST_PARTS)
    mixed = query.new_empty(1, rows, heads, size)
    partial = (
        mixed if parts == 1 else query.new_empty(parts, rows, heads, size, dtype=torch.float32)
    )
    weights = query.new_empty(parts, rows, heads, dtype=torch.float32)
    with torch.cuda.device_of(query):
        _attend_part[tiles, kv_heads, parts](
            query,
            key,
            value,
            mask.ancestors.contiguous().view(torch.int8),
            mask.positions,
            mask.start,
            partial,
            weights,
            query.stride(1),
            query.stride(2),
            key.stride(1),
            key.stride(2),
            value.stride(1),
            value.stride(2),
            rows,
            scaling * (2 / softcap if softcap else LOG2_E),
            (softcap or 0.0) * LOG2_E,
            mask.window or 0,
            GROUPS=groups,
            SIZE=size,
            PADDED=padded,
            TILE=tile,
            BLOCK=block,
            WINDOWED=mask.window is not None,
            CAPPED=softcap is not None,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        if parts > 1:
            _join[rows * heads,](
                partial,
                weights,
                mixed,
                parts,
                rows * heads,
                SIZE=size,
                PADDED=padded,
                PARTS=triton.next_power_of_2(parts),
                num_warps=1,
            )
    return mixed


@triton.jit(do_not_specialize=["rows", "window"])
def _attend_part(
    query,
    key,
    value,
    ancestors,
    positions,
    start,
    mixed,
    weights,
    query_head,
    query_row,
    key_head,
    key_step,
    value_head,
    value_step,
    rows,
    scale,
    cap,
    window,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """One tile of the [GROUPS * rows] queries of a key head, over one part of the keys.

    Writes the attention [part, row, head, SIZE] over that part, and the logarithm to base 2 of its softmax's sum to
    `weights` [part, row, head]. `query_head` and the like are strides; `mixed` and `weights` are contiguous.
    """
    kv_head = tl.program_id(1).to(tl.int64)  # a layer of the cache may hold more than 2^31 numbers
    part, parts = tl.program_id(2), tl.num_programs(2)
    flat = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = flat < GROUPS * rows
    flat = tl.where(there, flat, 0)
    row, head = flat % rows, kv_head * GROUPS + flat // rows
    dims = tl.arange(0, PADDED)
    used = dims < SIZE
    held = there[:, None] & used[None, :]
    queries = tl.load(
        query + (head * query_head + row * query_row)[:, None] + dims[None, :], mask=held, other=0.0
    )
    position = tl.load(positions + row).to(tl.int32)

    text = tl.load(start).to(tl.int32)
    first = 0
    if (
        WINDOWED
    ):  # no node's position is more than its place, so what lies before is too far for every row
        first = tl.maximum(tl.min(position, 0) - window + 1, 0) // BLOCK
    blocks = tl.cdiv(text + rows, BLOCK) - first
    begin, end = first + blocks * part // parts, first + blocks * (part + 1) // parts
    whole = text // BLOCK  # blocks before this one hold nothing but text

    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, PADDED], tl.float32)
    keys, values = key + kv_head * key_head, value + kv_head * value_head
    best, total, sums = _over_blocks(
        best,
        total,
        sums,
        begin,
        tl.minimum(end, whole),
        queries,
        keys,
        values,
        key_step,
        value_step,
        ancestors,
        positions,
        row,
        position,
        text,
        rows,
        scale,
        cap,
        window,
        SIZE,
        PADDED,
        BLOCK,
        False,
        WINDOWED,
        CAPPED,
    )
    best, total, sums = _over_blocks(
        best,
        total,
        sums,
        tl.maximum(begin, whole),
        end,
        queries,
        keys,
        values,
        key_step,
        value_step,
        ancestors,
        positions,
        row,
        position,
        text,
        rows,
        scale,
        cap,
        window,
        SIZE,
        PADDED,
        BLOCK,
        True,
        WINDOWED,
        CAPPED,
    )

    # A row that sees nothing of this part has a sum of 0: it writes zeros, and -inf as the logarithm.
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (part * rows + row) * (tl.num_programs(1) * GROUPS) + head
    tl.store(
        mixed + place[:, None] * SIZE + dims[None, :], sums.to(mixed.dtype.element_ty), mask=held
    )
    tl.store(weights + place, best + tl.log2(total), mask=there)


@triton.jit
def _over_blocks(
    best,
    total,
    sums,
    begin,
    end,
    queries,
    keys,
    values,
    key_step,
    value_step,
    ancestors,
    positions,
    row,
    position,
    text,
    rows,
    scale,
    cap,
    window,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    NODES: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Add blocks of keys to the running softmax of the queries [TILE, PADDED].

    Args:
        best, total: [TILE], the largest score to base 2, and the sum of the powers relative to it.
        sums: [TILE, PADDED], of the values, weighted likewise.
        NODES: whether the blocks hold the step's own rows, of which a row sees its ancestors; else all is text.
    """
    dims = tl.arange(0, PADDED)
    used = dims < SIZE
    for block in range(begin, end):
        place = block * BLOCK + tl.arange(0, BLOCK)
        written = place < text + rows
        block_keys = tl.load(
            keys + place[None, :] * key_step + dims[:, None],
            mask=used[:, None] & written[None, :],
            other=0.0,
        )
        scores = tl.dot(queries, block_keys, input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(scores) - 1)  # tanh of half of it
        if NODES:
            node = place - text
            is_node = (node >= 0) & (node < rows)
            ancestor = tl.load(
                ancestors + row[:, None] * rows + node[None, :], mask=is_node[None, :], other=0
            )
            seen = (node < 0)[None, :] | (ancestor != 0)
            if WINDOWED:
                at = tl.where(
                    is_node, tl.load(positions + node, mask=is_node, other=0).to(tl.int32), place
                )
                seen = seen & (at[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        elif WINDOWED:
            scores = tl.where(place[None, :] > position[:, None] - window, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        powers = tl.exp2(scores - level[:, None])
        faded = tl.exp2(best - level)
        block_values = tl.load(
            values + place[:, None] * value_step + dims[None, :],
            mask=written[:, None] & used[None, :],
            other=0.0,
        )
        total = total * faded + tl.sum(powers, 1)
        sums = sums * faded[:, None] + tl.dot(
            powers.to(block_values.dtype), block_values, input_precision="ieee"
        )
        best = higher
    return best, total, sums


@triton.jit(do_not_specialize=["parts", "count"])
def _join(
    partial,
    weights,
    mixed,
    parts,
    count,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The attention of one row of one head from that over the parts: [parts, count, SIZE] -> [count, SIZE]."""
    item = tl.program_id(0)
    dims, part = tl.arange(0, PADDED), tl.arange(0, PARTS)
    there, used = part < parts, dims < SIZE
    logarithm = tl.load(weights + part * count + item, mask=there, other=float("-inf"))
    shares = tl.exp2(
        logarithm - tl.max(logarithm, 0)
    )  # every row sees itself, so one part is not empty
    shares = shares / tl.sum(shares, 0)
    rows = tl.load(
        partial + (part * count + item)[:, None] * SIZE + dims[None, :],
        mask=there[:, None] & used[None, :],
        other=0.0,
    )
    tl.store(
        mixed + item * SIZE + dims,
        tl.sum(rows * shares[:, None], 0).to(mixed.dtype.element_ty),
        mask=used,
    )
