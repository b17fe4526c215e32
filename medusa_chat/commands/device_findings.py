"""Devices as `doctor` describes them, and facts of a CUDA GPU that decide how fast steps are."""

from __future__ import annotations

import os
import shutil
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from medusa_chat.machine.devices import maps_memory, processor_name
from medusa_chat.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MOST_ROWS = 256
LEAST_BF16 = (8, 0)


def describe_device(name: str) -> str:
    """Describe a device by its model and abilities."""
    import torch

    if name == "cpu":
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        abilities = (
            processor_name(),
            f"{torch.get_num_threads()} of {os.cpu_count()} threads",
            torch.backends.cpu.get_cpu_capability(),
            "computes in bfloat16" if bfloat16 else "no bfloat16",
        )
        return ", ".join(abilities)
    if name == "mps":
        return "Apple GPU, sharing the memory of the CPU"
    found = torch.cuda.get_device_properties(name)
    capability = f"compute capability {found.major}.{found.minor}"
    return f"{found.name}, {capability}, CUDA {torch.version.cuda}"


def gpu_facts(name: str, dtype: torch.dtype) -> Iterator[tuple[str, str, bool]]:
    """Yield facts of the GPU of that name: a subject, a text, and whether it is a fault.

    Args:
        name: cuda:0 and so on.
        dtype: that 4-bit layers multiply in.
    """
    import torch

    from medusa_chat.decoding.draft.base import BUCKETS
    from medusa_chat.decoding.graphs.static_step import SHORTEST_SPAN
    from medusa_chat.model.attention.rule import Shape, choose_attention
    from medusa_chat.model.fused.rule import choose_operations

    device = torch.device(name)
    model = SHAPES["vicuna-7b"]
    shape = Shape(model.heads, model.kv_heads, model.head_dim, dtype)
    choice = choose_attention(device, shape)
    why = f" ({choice.reason})" if choice.reason else ""
    yield "attention", f"{choice.name} in recorded steps{why}; that of cuDNN is off", False
    operations, reason = choose_operations(device, dtype)
    layers = "norms, gates and rotary positions in a kernel each"
    yield "layers", layers if operations else f"transformers' own ({reason})", False
    compiler = c_compiler()
    missing = "none, which Triton needs: install gcc, or set CC"
    yield "C compiler", compiler or missing, compiler is None
    rows = ", ".join(map(str, BUCKETS))
    yield (
        "recorded",
        f"steps of {rows} rows, at their first use, and again when the text outgrows"
        f" {SHORTEST_SPAN} tokens, twice as many and so on",
        False,
    )
    if torch.cuda.get_device_capability(device) < LEAST_BF16:
        yield "numbers", "float16, in which Gemma models overflow: --dtype float32", False
    yield "4-bit rows", fused_rows(device.index or 0, dtype), False
    joins = "joins" if maps_memory() else "does not join"
    yield "memory", f"the allocator {joins} what is free in pieces (expandable_segments)", False


def c_compiler() -> str | None:
    """Return the C compiler that Triton takes, or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def fused_rows(index: int, dtype: torch.dtype) -> str:
    """Say up to how many rows bitsandbytes multiplies 4-bit weights of a 7B model in one kernel."""
    try:
        from bitsandbytes.backends.cuda.ops import _gemm_4bit_use_custom_cuda as fuses
    except (ImportError, AttributeError):
        return "unknown: this bitsandbytes has other kernels than 0.50"
    model = SHAPES["vicuna-7b"]
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layers = {
        "qkv": (queries + 2 * keys, model.hidden),
        "o": (model.hidden, queries),
        "gate-up": (2 * model.intermediate, model.hidden),
        "down": (model.hidden, model.intermediate),
    }
    counts = []
    for layer, (width, depth) in layers.items():
        fused = takewhile(
            lambda rows: fuses(index, dtype, rows, width, depth),  # noqa: B023
            range(1, MOST_ROWS + 1),
        )
        counts.append(f"{layer} {max(fused, default=0)}")
    return (
        f"bitsandbytes fuses the 4-bit layers of a 7B model up to these rows: {', '.join(counts)}"
    )


def nf4_product(device: str, dtype: torch.dtype) -> tuple[float, bool]:
    """Multiply with a small nf4 layer.

    Returns:
        the largest error, relative to the largest value, and True if the weights were packed for
        the CPU.
    """
    import torch
    from bitsandbytes import nn
    from bitsandbytes.functional import dequantize_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).to(dtype)
    rows = torch.randn(4, 128, generator=generator).to(device, dtype)
    modules: Any = nn  # bitsandbytes has no types
    layer = modules.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = modules.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device).eval()
    with torch.inference_mode():
        plain = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        expected = rows.float() @ plain.float().T
        error = (layer(rows).float() - expected).abs().max() / expected.abs().max()
    return float(error), bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))
