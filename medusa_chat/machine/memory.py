"""What a load will need, part by part, before it happens, and what is free. No torch until a GPU is asked."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from medusa_chat.config import MAX_CONTEXT, MAX_NODES, ModelSpec, UserError
from medusa_chat.hub.model_list import packaged_file, read_models
from medusa_chat.machine.contents import Contents, contents_of
from medusa_chat.machine.devices import free_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medusa_chat.shapes import Shape

GB = 10**9
# Bytes of a weight. nf4: half a byte, and a 4-byte scale for each block of 64; nf4-double: those scales in a byte
# each, with scales of their own for blocks of 256. int8: a byte; a scale a row does not count.
BYTES = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
PACKED = {
    "nf4": 0.5 + 2 / 64,
    "nf4-double": 0.5 + 2 / 64,
    "int8": 1.0,
}  # as a CPU that computes in bfloat16 has them
QUANTIZING = dict.fromkeys(BYTES, 10.0)  # while a matrix is quantized (measured)
PROCESS = {
    "cpu": 450_000_000,
    "cuda": 3 * GB,
    "mps": 700_000_000,
}  # host: interpreter, torch, transformers (measured)
GPU_LIBRARIES = 400_000_000  # on the device: cuBLAS's workspaces, and what the allocator rounds up
PREFILL_ROWS = 512
TREE_ROWS = 64
STEP = 64  # granularity of a context that is proposed
SMALLEST_CONTEXT = 256  # shorter is no chat


@dataclass(frozen=True)
class Load:
    """How a model would be loaded. width: bytes of a number that is not quantized."""

    device: str = "cpu"
    quant: str = "none"
    quant_heads: str = "none"
    context: int | None = None
    width: int = 2


@dataclass(frozen=True)
class Plan:
    """Bytes that a load needs at its peak on one device, part by part.

    Attributes:
        plain: embeddings, LM head, norms; packed: what the files hold quantized.
        cache: keys and values of the whole context.
        workspace: the most that anything passing takes beyond what stays.
        process: what is there without a model.
    """

    layers: int = 0
    plain: int = 0
    packed: int = 0
    heads: int = 0
    cache: int = 0
    workspace: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load_of(spec: ModelSpec, device: str, context: int | None = None, width: int = 2) -> Load:
    """The load that a spec asks for; `auto` is 16 bit."""
    quant, heads = ("none" if each == "auto" else each for each in (spec.quant, spec.quant_heads))
    return Load(device, quant, heads, context, width)


def plan(contents: Contents, load: Load) -> Plan:
    """What a load needs on the device that computes."""
    kind = load.device.split(":")[0]
    shape, width = contents.shape, load.width
    context = load.context or min(shape.context, MAX_CONTEXT)
    plain = contents.plain
    if kind == "cpu" and shape.tied:
        plain += (
            shape.embedding_parameters
        )  # the LM head's own copy, in the layout of the CPU's matmul
    kept = PACKED if kind == "cpu" and width == 2 else BYTES
    heads = contents.heads
    if load.quant_heads != "none" and heads and contents.largest_head < shape.embedding_parameters:
        heads += (
            shape.embedding_parameters
        )  # a copy of the LM head for the guesses of heads that share it
    heads = weight_bytes(heads, load.quant_heads, width, kept)
    cache = shape.cache_bytes(context + MAX_NODES, width)
    # While weights are quantized, what comes later is not there yet: layers come first, heads next, then the cache.
    # On a CPU all heads are read before they are quantized or, in bfloat16, laid out anew, one by one.
    read = (
        contents.heads * width
        if kind == "cpu" and (load.quant_heads != "none" or width == 2)
        else 0
    )
    one = (
        0
        if load.quant_heads == "none"
        else weight_bytes(contents.largest_head, load.quant_heads, width, QUANTIZING)
    )
    # Where its kernel takes no more rows, bitsandbytes lays gate and up out in 16 bits: once for prompts, once in the
    # memory that recorded steps share.
    unpacked = (
        2 * 2 * contents.largest * width if kind == "cuda" and load.quant.startswith("nf4") else 0
    )
    passing = max(
        _running(shape, context, width) + unpacked,
        weight_bytes(contents.largest, load.quant, width, QUANTIZING) - heads - cache,
        one + read - cache,
    )
    return Plan(
        layers=weight_bytes(contents.layers, load.quant, width, kept),
        plain=plain * width,
        packed=contents.packed,
        heads=heads,
        cache=cache,
        workspace=passing,
        process=PROCESS["cpu"] if kind == "cpu" else GPU_LIBRARIES,
    )


def host_plan(contents: Contents, load: Load) -> Plan:
    """What a load on a GPU needs of the host: the backbone passes one tensor at a time, the heads together."""
    staging = max(contents.largest, contents.shape.embedding_parameters) * 4
    return Plan(
        workspace=max(staging, contents.heads * load.width),
        process=PROCESS[load.device.split(":")[0]],
    )


def weight_bytes(weights: int, quant: str, width: int, each: Mapping[str, float] = BYTES) -> int:
    """Bytes of weights in a quantization that takes `each` bytes for one, or unquantized at `width` bytes."""
    return weights * width if quant == "none" else int(weights * each[quant])


def _running(shape: Shape, context: int, width: int) -> int:
    """The most that a forward takes: a piece of the prompt, or a tree with its logits in 32 bits, some times over."""
    states = (
        4 * shape.hidden
        + 3 * shape.intermediate
        + 2 * shape.head_dim * (shape.heads + shape.kv_heads)
    )
    prefill = PREFILL_ROWS * (states + 2 * context) * width
    return max(prefill, TREE_ROWS * (states * width + shape.vocabulary * (width + 3 * 4)))


def shortage(contents: Contents, load: Load, free: Mapping[str, int]) -> tuple[str, int, int]:
    """The device that lacks most, what the load needs there, and how much of that is missing (0 or less: it fits).

    Args:
        free: bytes free by device: that of the load, and `cpu`.
    """
    needs = {load.device: plan(contents, load).total}
    if load.device != "cpu":
        needs["cpu"] = host_plan(contents, load).total
    return lacking(needs, free)


def lacking(needs: Mapping[str, int], free: Mapping[str, int]) -> tuple[str, int, int]:
    """Of the bytes needed on each device: where most is lacking, what is needed there, and how much is missing."""
    device = max(needs, key=lambda name: needs[name] - free[name])
    return device, needs[device], needs[device] - free[device]


def free_on(device: str) -> dict[str, int]:
    """Bytes free on a device and on the host."""
    return {name: free_memory(name) for name in {device, "cpu"}}


def complaint(
    what: str, short: tuple[str, int, int], advice: Sequence[str], counted: str = ""
) -> UserError:
    """The line for what does not fit.

    Args:
        short: device, bytes needed and bytes missing, as `lacking` gives them.
        advice: what would make it fit, each on its own.
        counted: what the bytes are needed for, where that is not all that runs will take.
    """
    device, needed, missing = short
    sizes = f"{gigabytes(needed)}{counted}, {gigabytes(needed - missing)} free on {device}, {gigabytes(missing)} short"
    remedy = " or ".join(advice) or "nothing that medusa-chat can change"
    return UserError(
        f"{what} needs {sizes}; {remedy} would make it fit; --ignore-memory goes on all the same"
    )


def gigabytes(size: int) -> str:
    """Bytes as the line tells them."""
    return f"{size / GB:.1f} GB"


def check(spec: ModelSpec, load: Load) -> None:
    """Raise UserError if a load needs more memory than is free: by how much, and what would make it fit.

    A model whose sizes are not known passes.
    """
    contents = contents_of(spec)
    if contents is None:
        return
    free = free_on(load.device)
    short = shortage(contents, load, free)
    if short[2] > 0:
        raise complaint(spec.name, short, remedies(contents, load, free))


def remedies(contents: Contents, load: Load, free: Mapping[str, int]) -> list[str]:
    """What would make a load fit, as the command line takes it: one change, else all of them, and a smaller model."""

    def fits(changed: Load) -> bool:
        return shortage(contents, changed, free)[2] <= 0

    changes: dict[str, dict[str, Any]] = {}
    if load.quant in ("none", "int8") and not contents.packed:
        changes["--quant nf4"] = {"quant": "nf4"}
    if load.quant_heads in ("none", "int8") and contents.heads:
        changes["--quant-heads nf4"] = {"quant_heads": "nf4"}
    found = [flag for flag, change in changes.items() if fits(replace(load, **change))]
    if context := _longest(contents, load, free):
        found.append(f"--max-context {context}")
    if changes and not found:
        all_changed = replace(
            load, **{key: value for change in changes.values() for key, value in change.items()}
        )
        if fits(all_changed):
            found = [" with ".join(changes)]
        elif context := _longest(contents, all_changed, free):
            found = [" with ".join([*changes, f"--max-context {context}"])]
    smaller = _smaller(contents, load, free)
    return [*found, f"--model {smaller}"] if smaller else found


def _longest(contents: Contents, load: Load, free: Mapping[str, int]) -> int:
    """The longest context that fits; 0 if none shorter than the load's does."""
    asked = load.context or min(contents.shape.context, MAX_CONTEXT)
    low, high = SMALLEST_CONTEXT // STEP - 1, (asked - 1) // STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = shortage(contents, replace(load, context=middle * STEP), free)[2] <= 0
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * STEP if low * STEP >= SMALLEST_CONTEXT else 0


def _smaller(contents: Contents, load: Load, free: Mapping[str, int]) -> str | None:
    """The largest of the models that ship with medusa-chat's list that is smaller and fits as its entry says."""
    found: dict[str, int] = {}
    for name, other in read_models(packaged_file()).items():
        theirs = contents_of(other)
        if theirs is None or theirs.layers >= contents.layers:
            continue
        if shortage(theirs, load_of(other, load.device, None, load.width), free)[2] <= 0:
            found[name] = theirs.layers
    return max(found, key=lambda name: found[name], default=None)
