"""Tree attention over a fixed span of the cache as a Triton kernel.

`tree_attention.torch_attention` computes the same and is the reference.

A program holds some rows of all query heads that share a key head, and walks over a part of the
text's keys. So a key is read once for all of these rows, and a single row of text still fills a
GPU. A second kernel joins the parts by the sums of their softmaxes, as flash decoding does. Keys
after the step's rows, or before a window, are not read.
"""
# No `from __future__ import annotations`: Triton evaluates the annotations. It has none for
# tensors and numbers, and names constants in upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa_chat.model.attention.tree_attention import TreeMask

# Bytes of a block of keys. With that of values, twice in flight, and the queries: 80 KiB.
BLOCK_BYTES = 16384
LARGEST_BLOCK = 64  # rows, or keys
SMALLEST_BLOCK = 16  # the least that tl.dot takes
MOST_PARTS = 32
STAGES = 2  # blocks of keys in flight: with three, some GPUs run out of shared memory
WIDE = 64 * 128  # numbers of a tile
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiling:
    """Sizes of the kernel's work for one shape of query and key."""

    groups: int  # query heads for each key head
    padded: int  # head_dim rounded up to what tl.dot takes
    block: int  # keys read at a time
    tile: int  # rows of a program
    tiles: int  # programs for the rows of a key head
    parts: int  # programs that share the keys of a tile
    warps: int  # of a program; with fewer, large tiles of wide heads spill registers

    @classmethod
    def of(cls, query: Tensor, key: Tensor, programs: int) -> "Tiling":
        """Choose sizes that make about `programs` programs."""
        _, heads, rows, size = query.shape
        kv_heads, span = key.shape[1:3]
        groups = heads // kv_heads
        padded = max(triton.next_power_of_2(size), SMALLEST_BLOCK)
        fitting = max(BLOCK_BYTES // (padded * query.element_size()), SMALLEST_BLOCK)
        block = min(fitting, LARGEST_BLOCK)
        tile = min(max(triton.next_power_of_2(groups * rows), SMALLEST_BLOCK), block)
        tiles = triton.cdiv(groups * rows, tile)
        wanted = max(programs // (tiles * kv_heads), 1)
        parts = min(wanted, triton.cdiv(span, block), MOST_PARTS)
        warps = 8 if tile * padded >= WIDE else 4
        return cls(groups, padded, block, tile, tiles, parts, warps)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scaling: float,
    softcap: float | None = None,
    programs: int = 128,
) -> Tensor:
    """Attend as `torch_attention` does, in float32, bfloat16 or float16.

    Keys and values are read up to `start + n`; what follows may be NaN. About `programs` programs
    run; they differ in key heads, then rows, then parts of the text.
    """
    _, heads, rows, size = query.shape
    kv_heads = key.shape[1]
    tiling = Tiling.of(query, key, programs)
    parts = tiling.parts
    mixed = query.new_empty(1, rows, heads, size)
    partial = mixed
    if parts > 1:
        partial = query.new_empty(parts, rows, heads, size, dtype=torch.float32)
    weights = query.new_empty(parts, rows, heads, dtype=torch.float32)
    ancestors = mask.ancestors.contiguous().view(torch.int8)
    sizes = {"SIZE": size, "PADDED": tiling.padded}
    with torch.cuda.device_of(query):
        _attend_part[tiling.tiles, kv_heads, parts](
            *(_strided(each) for each in (query, key, value)),
            (ancestors, mask.positions, mask.start),
            (partial, weights),
            rows,
            scaling * (2 / softcap if softcap else LOG2_E),
            softcap * LOG2_E if softcap else None,
            mask.window,
            **sizes,
            GROUPS=tiling.groups,
            TILE=tiling.tile,
            BLOCK=tiling.block,
            num_warps=tiling.warps,
            num_stages=STAGES,
        )
        if parts > 1:
            most = triton.next_power_of_2(parts)
            count = rows * heads
            _join[count,](partial, weights, mixed, parts, count, **sizes, PARTS=most, num_warps=1)
    return mixed


def _strided(tensor: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor whose rows are dense, with its strides from head to head and row to row."""
    dense = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return dense, dense.stride(1), dense.stride(2)


@triton.jit(do_not_specialize=["rows", "window"])
def _attend_part(
    query,
    key,
    value,
    tree,
    output,
    rows,
    scale,
    cap,
    window,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend from one tile of a key head's GROUPS * rows queries to one part of the keys.

    `query`, `key`, `value`: pointer, head stride, row stride. `tree`: ancestors, positions, start.
    `output`: attention over this part [part, row, head, SIZE], log2 of its softmax's sum.
    """
    kv_head = tl.program_id(1).to(tl.int64)  # a layer of the cache may hold more than 2^31 numbers
    flat = tl.program_id(0) * TILE + tl.arange(0, TILE)
    held = flat < GROUPS * rows
    flat = tl.where(held, flat, 0)
    row, head = flat % rows, kv_head * GROUPS + flat // rows
    position = tl.load(tree[1] + row).to(tl.int32)
    dims = tl.arange(0, PADDED)
    used = held[:, None] & (dims < SIZE)[None, :]
    places = (head * query[1] + row * query[2])[:, None] + dims[None, :]
    tile = (tl.load(query[0] + places, mask=used, other=0.0), row, position)
    cache = (key[0] + kv_head * key[1], key[2], value[0] + kv_head * value[1], value[2])
    text = tl.load(tree[2]).to(tl.int32)
    limits = (text, rows, scale, cap, window)
    begin, end = _part_of_blocks(position, text + rows, window, BLOCK)
    whole = text // BLOCK  # blocks before this one hold nothing but text
    middle, nodes = tl.minimum(end, whole), tl.maximum(begin, whole)
    best = tl.full([TILE], float("-inf"), tl.float32)
    softmax = (best, tl.zeros([TILE], tl.float32), tl.zeros([TILE, PADDED], tl.float32))
    softmax = _over_blocks(softmax, begin, middle, tile, cache, tree, limits, SIZE, BLOCK, False)
    softmax = _over_blocks(softmax, nodes, end, tile, cache, tree, limits, SIZE, BLOCK, True)

    best, total, sums = softmax
    # A row that sees nothing of this part has a sum of 0: it writes zeros, and -inf as logarithm.
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (tl.program_id(2) * rows + row) * (tl.num_programs(1) * GROUPS) + head
    mixed, weights = output
    places = mixed + place[:, None] * SIZE + dims[None, :]
    tl.store(places, sums.to(mixed.dtype.element_ty), mask=used)
    tl.store(weights + place, best + tl.log2(total), mask=held)


@triton.jit
def _part_of_blocks(position, length, window, BLOCK: tl.constexpr):
    """Return the first block of this program's part of the keys, and the one after its last."""
    first = 0
    if window is not None:
        # No node's position exceeds its place: what lies before is too far for every row.
        first = tl.maximum(tl.min(position, 0) - window + 1, 0) // BLOCK
    blocks = tl.cdiv(length, BLOCK) - first
    part, parts = tl.program_id(2), tl.num_programs(2)
    return first + blocks * part // parts, first + blocks * (part + 1) // parts


@triton.jit
def _over_blocks(
    softmax,
    begin,
    end,
    tile,
    cache,
    tree,
    limits,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NODES: tl.constexpr,
):
    """Add blocks of keys to the running softmax of a tile's queries; returns the softmax.

    `softmax`: the largest score to base 2 [TILE], the sum of the powers relative to it [TILE],
    the values weighted by them [TILE, PADDED]. With NODES the blocks hold the step's own rows too.
    """
    best, total, sums = softmax
    queries, row, position = tile
    keys, key_step, values, value_step = cache
    text, rows, scale, cap, window = limits
    dims = tl.arange(0, queries.shape[1])
    used = dims < SIZE
    for block in range(begin, end):
        place = block * BLOCK + tl.arange(0, BLOCK)
        written = place < text + rows
        there = used[:, None] & written[None, :]
        places = place[None, :] * key_step + dims[:, None]
        block_keys = tl.load(keys + places, mask=there, other=0.0)
        scores = tl.dot(queries, block_keys, input_precision="ieee") * scale
        if cap is not None:
            scores = cap * (2 * tl.sigmoid(scores) - 1)  # tanh of half the scores
        scores = _hide(scores, place, tree, row, position, text, rows, window, NODES)
        higher = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        powers = tl.exp2(scores - level[:, None])
        faded = tl.exp2(best - level)
        there = written[:, None] & used[None, :]
        places = place[:, None] * value_step + dims[None, :]
        block_values = tl.load(values + places, mask=there, other=0.0)
        powers_16 = powers.to(block_values.dtype)
        total = total * faded + tl.sum(powers, 1)
        sums = sums * faded[:, None] + tl.dot(powers_16, block_values, input_precision="ieee")
        best = higher
    return best, total, sums


@triton.jit
def _hide(scores, place, tree, row, position, text, rows, window, NODES: tl.constexpr):
    """Set the scores [TILE, BLOCK] of keys that a row does not see to -inf."""
    if NODES:
        key = place - text
        is_node = (key >= 0) & (key < rows)
        ancestors = tree[0] + row[:, None] * rows + key[None, :]
        seen = (key < 0)[None, :] | (tl.load(ancestors, mask=is_node[None, :], other=0) != 0)
        if window is not None:
            at = tl.load(tree[1] + key, mask=is_node, other=0).to(tl.int32)
            at = tl.where(is_node, at, place)
            seen = seen & (at[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    elif window is not None:
        scores = tl.where(place[None, :] > position[:, None] - window, scores, float("-inf"))
    return scores


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
    """Join the attention of one row of one head over all parts: [parts, count, SIZE] -> SIZE."""
    item = tl.program_id(0)
    dims, part = tl.arange(0, PADDED), tl.arange(0, PARTS)
    there, used = part < parts, dims < SIZE
    logarithm = tl.load(weights + part * count + item, mask=there, other=float("-inf"))
    shares = tl.exp2(logarithm - tl.max(logarithm, 0))  # a row sees itself: one part is not empty
    shares = shares / tl.sum(shares, 0)
    places = (part * count + item)[:, None] * SIZE + dims[None, :]
    rows = tl.load(partial + places, mask=there[:, None] & used[None, :], other=0.0)
    joined = tl.sum(rows * shares[:, None], 0).to(mixed.dtype.element_ty)
    tl.store(mixed + item * SIZE + dims, joined, mask=used)
