"""The memory that a load will need, part by part. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from medusa_chat.config import MAX_CONTEXT, MAX_NODES, PREFILL_ROWS, ModelSpec
from medusa_chat.machine.devices import maps_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medusa_chat.machine.contents import Contents
    from medusa_chat.shapes import Shape

GB = 10**9
# Bytes per weight. nf4: half a byte, and a 4-byte scale per block of 64. nf4-double: those scales
# in a byte each, with scales of their own per block of 256. int8: a byte.
BYTES = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# The same after packing for a CPU that computes in bfloat16.
PACKED = {"nf4": 0.5 + 2 / 64, "nf4-double": 0.5 + 2 / 64, "int8": 1.0}
# The same as the native step packs them: nf4 with a 4-byte scale a block.
NATIVE = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 4 / 64, "int8": 1.0}
QUANTIZING = dict.fromkeys(BYTES, 10.0)  # while a matrix is quantized (measured)
# On the host: interpreter, torch and transformers (measured).
PROCESS = {"cpu": 450_000_000, "cuda": 3 * GB, "mps": 700_000_000}
GPU_LIBRARIES = 400_000_000  # on the device: cuBLAS's workspaces, and the allocator's rounding
RECORDED_ROWS = (1, 8, 16, 32, 64)  # of steps that are recorded as CUDA graphs; larger are rare
# Of a sorted score: float32, sorted float32, its place (8), the sort's workspace (12), cumulated.
SORTED_BYTES = 4 + 4 + 8 + 12 + 4
GRAPH_BYTES = 16_000_000  # that the driver keeps of one recorded forward (no GPU has shown it yet)
SPANS = 2  # spans of the cache that a chat records forwards for, often
# Holes that separate q, k, v, gate and up leave when they are joined; none where the allocator can
# map memory anew (devices.maps_memory).
HOLES = 0.2


@dataclass(frozen=True)
class Load:
    """Settings of a load that its memory depends on.

    Attributes:
        width: bytes of an unquantized number.
        native: the native step packs the weights.
    """

    device: str = "cpu"
    quant: str = "none"
    quant_heads: str = "none"
    context: int | None = None
    width: int = 2
    native: bool = False

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return self.device.split(":")[0]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a load needs at its peak on one device, part by part.

    Attributes:
        plain: embeddings, LM head and norms.
        packed: tensors that the files hold quantized.
        cache: keys and values of the whole context.
        workspace: the most that temporary tensors need in addition.
        graphs: steps that are recorded as CUDA graphs, with the tensors that they share.
        holes: memory that the allocator cannot use again.
        process: the program without a model.
    """

    layers: int = 0
    plain: int = 0
    packed: int = 0
    heads: int = 0
    cache: int = 0
    workspace: int = 0
    graphs: int = 0
    holes: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load_of(
    spec: ModelSpec,
    device: str,
    context: int | None = None,
    width: int = 2,
    *,
    native: bool = False,
) -> Load:
    """Return the load that a spec asks for; its `auto` is 16 bit."""
    quants = (spec.quant, spec.quant_heads)
    quant, heads = ("none" if each == "auto" else each for each in quants)
    return Load(device, quant, heads, context, width, native)


def plan(contents: Contents, load: Load) -> MemoryPlan:
    """Plan the memory of the device that computes."""
    if load.native:
        return _native_plan(contents, load)
    shape = contents.shape
    width = load.width
    on_cpu = load.kind == "cpu"
    kept = PACKED if on_cpu and width == 2 else BYTES
    plain = contents.plain
    if on_cpu and shape.tied:
        plain += shape.embedding_parameters  # a copy of the LM head, laid out for the CPU's matmul
    context = load.context or min(shape.context, MAX_CONTEXT)
    cache = shape.cache_bytes(context + MAX_NODES, width)
    head_bytes = _heads_bytes(contents, load, kept)
    # Layers are quantized first, then heads, then the cache is made: while weights are quantized,
    # the memory of what comes later is free.
    workspace = max(
        _forward_bytes(shape, context, width) + _unpacked_bytes(contents, load),
        weight_bytes(contents.largest, load.quant, width, QUANTIZING) - head_bytes - cache,
        _reading_heads_bytes(contents, load) - cache,
    )
    layers = weight_bytes(contents.layers, load.quant, width, kept)
    on_cuda = load.kind == "cuda"
    return MemoryPlan(
        layers=layers,
        plain=plain * width,
        packed=contents.packed,
        heads=head_bytes,
        cache=cache,
        workspace=workspace,
        graphs=_graph_bytes(shape, width) if on_cuda else 0,
        holes=int(HOLES * layers) if on_cuda and not maps_memory() else 0,
        process=PROCESS["cpu"] if on_cpu else GPU_LIBRARIES,
    )


def _native_plan(contents: Contents, load: Load) -> MemoryPlan:
    """Plan the memory of the native step: packed matrices, and a matrix that is being packed.

    Files in another format than `width` says are converted as a whole before that; they count as
    far as what comes after packing does not need more.
    """
    shape, width = contents.shape, load.width
    context = load.context or min(shape.context, MAX_CONTEXT)
    cache = shape.cache_bytes(context + MAX_NODES, width)
    lm_head = "none" if load.quant == "none" else "int8"
    embedding = shape.embedding_parameters
    plain = contents.plain * width
    if shape.tied:  # the embedding stays beside the packed LM head
        plain += weight_bytes(embedding, lm_head, width, NATIVE)
    else:
        plain += weight_bytes(embedding, lm_head, width, NATIVE) - embedding * width
    heads = _heads_bytes(contents, load, NATIVE)
    matrix = max(contents.largest, embedding) * width
    reading_heads = contents.heads * width
    unpacked = 0
    if contents.unpacked:  # all of the model is in memory before its first matrix is packed
        packed = weight_bytes(contents.layers, load.quant, width, NATIVE) + plain
        unpacked = (contents.layers + contents.plain) * width + matrix - packed
    workspace = max(matrix, reading_heads, unpacked - heads) - cache
    return MemoryPlan(
        layers=weight_bytes(contents.layers, load.quant, width, NATIVE),
        plain=plain,
        packed=contents.packed,
        heads=heads,
        cache=cache,
        workspace=max(workspace, _native_step_bytes(shape, contents)),
        process=PROCESS["cpu"],
    )


def _heads_bytes(contents: Contents, load: Load, each: Mapping[str, float]) -> int:
    """Return the bytes of the heads, with a copy of the LM head that they share, if they make one.

    They do if theirs is quantized, but for the native step, or has rows for their tokens only.
    """
    shape = contents.shape
    matrices = contents.heads - contents.parent_bias
    lm_head = (contents.head_tokens or shape.vocabulary) * shape.hidden
    copied = contents.head_tokens or (load.quant_heads != "none" and not load.native)
    if contents.heads and copied and contents.largest_head < lm_head:
        matrices += lm_head
    matrix_bytes = weight_bytes(matrices, load.quant_heads, load.width, each)
    return matrix_bytes + contents.parent_bias * load.width


def _native_step_bytes(shape: Shape, contents: Contents) -> int:
    """Return what an engine of the native step allocates, with the logits of the largest tree."""
    attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    states = 3 * shape.hidden + 2 * shape.intermediate + attention
    guesses = 8 if contents.heads else 0
    return 4 * (MAX_NODES * (states + 2 * shape.vocabulary) + guesses * shape.vocabulary)


def host_plan(contents: Contents, load: Load) -> MemoryPlan:
    """Plan the host's memory of a load on a GPU.

    The backbone passes through it one tensor at a time, the heads all together.
    """
    staging = max(contents.largest, contents.shape.embedding_parameters) * 4
    workspace = max(staging, contents.heads * load.width)
    return MemoryPlan(workspace=workspace, process=PROCESS[load.kind])


def weight_bytes(weights: int, quant: str, width: int, each: Mapping[str, float] = BYTES) -> int:
    """Return the bytes of weights: `width` for each, or `each[quant]` if they are quantized."""
    return weights * width if quant == "none" else int(weights * each[quant])


def _forward_bytes(shape: Shape, context: int, width: int) -> int:
    """Return the most that a forward needs: a piece of the prompt, or the largest tree.

    A tree's logits are needed in 32 bits too, several times.
    """
    states = _row_states(shape)
    prefill = PREFILL_ROWS * (states + 2 * context) * width
    return max(prefill, MAX_NODES * (states * width + shape.vocabulary * (width + 3 * 4)))


def _row_states(shape: Shape) -> int:
    """Count the numbers that a row of a forward needs at a time."""
    attention = 2 * shape.head_dim * (shape.heads + shape.kv_heads)
    return 4 * shape.hidden + 3 * shape.intermediate + attention


def _graph_bytes(shape: Shape, width: int) -> int:
    """Return what recorded steps take: logits of each number of rows, a pool, the graphs.

    The pool holds the temporary tensors of the largest: a forward's, and the scores of a rule that
    sorts them.
    """
    buffers = sum(RECORDED_ROWS) * (shape.vocabulary + shape.hidden) * width
    scores = shape.vocabulary * (width + SORTED_BYTES)
    pool = max(RECORDED_ROWS) * (_row_states(shape) * width + scores)
    return buffers + pool + len(RECORDED_ROWS) * SPANS * GRAPH_BYTES


def _unpacked_bytes(contents: Contents, load: Load) -> int:
    """Return the bytes of gate and up in 16 bits, which bitsandbytes unpacks for many rows.

    They exist twice: for prompts, and in the memory that captured steps share.
    """
    if load.kind != "cuda" or not load.quant.startswith("nf4"):
        return 0
    return 2 * 2 * contents.largest * load.width


def _reading_heads_bytes(contents: Contents, load: Load) -> int:
    """Return the temporary bytes while heads are read and quantized.

    A CPU reads them all before it quantizes them one by one or, in bfloat16, packs them.
    """
    needed = 0
    if load.quant_heads != "none":
        needed += weight_bytes(contents.largest_head, load.quant_heads, load.width, QUANTIZING)
    if load.kind == "cpu" and (load.quant_heads != "none" or load.width == 2):
        needed += contents.heads * load.width
    return needed
