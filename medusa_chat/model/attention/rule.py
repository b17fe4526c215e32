"""The attention of recorded steps on a GPU: the Triton kernel where it works, else torch's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from medusa_chat.model.attention.tree_attention import Attend, TreeMask, torch_attention
from medusa_chat.text import reason_of

SWITCH = "MEDUSA_CHAT_ATTENTION"  # torch: leave the kernel out
TORCH, TRITON = "torch", "Triton"
LEAST_CAPABILITY = (8, 0)  # before Ampere, Triton has no matrix products in hardware
TOLERANCE = {torch.float32: 1e-4}  # between two implementations, relative to the largest number
TOLERANCE_16_BIT = 0.02
CHECKED_ROWS = 16
CHECKED_TEXT = 300

Inputs = tuple[Tensor, Tensor, Tensor, TreeMask, float, float | None]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's attention, as the check needs them."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class Choice:
    """The implementation in use.

    Attributes:
        name: TORCH or TRITON.
        reason: why it is not the kernel; "" if it is, or on a CPU.
    """

    name: str
    attend: Attend
    reason: str = ""


def choose_attention(device: torch.device, shape: Shape) -> Choice:
    """Choose how recorded steps attend: by the kernel, if it is right at this shape."""
    if device.type != "cuda":
        return Choice(TORCH, torch_attention)
    # A mask rules flash out; cuDNN plans for each number of keys, and that is new at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if os.environ.get(SWITCH) == "torch":
        return Choice(TORCH, torch_attention, f"{SWITCH}=torch")
    try:
        attend = kernel_for(device)
        check(attend, shape, device)
    except Exception as error:  # compilers, drivers and a missing Triton raise many kinds
        return Choice(TORCH, torch_attention, f"{type(error).__name__}: {reason_of(error)}")
    return Choice(TRITON, attend)


def kernel_for(device: torch.device) -> Attend:
    """Return the kernel, laid over a GPU.

    Raises:
        NotImplementedError: the GPU is too old.
        ImportError: Triton is missing.
    """
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise NotImplementedError("Triton multiplies matrices from compute capability 8.0 on")
    from medusa_chat.model.attention.kernel import attend

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return partial(attend, programs=2 * processors)


def check(attend: Attend, shape: Shape, device: torch.device) -> None:
    """Attend once to random numbers; raise ArithmeticError if that is off by more than rounding."""
    inputs = random_inputs(shape, device, CHECKED_ROWS, CHECKED_TEXT)
    expected = torch_attention(*inputs)
    largest = expected.abs().max().item()
    worst = (attend(*inputs) - expected).abs().max().item()
    if not worst <= TOLERANCE.get(shape.dtype, TOLERANCE_16_BIT) * largest:
        raise ArithmeticError(f"off by {worst:.2g} of {largest:.2g}")


def random_inputs(shape: Shape, device: torch.device, rows: int, text: int) -> Inputs:
    """Make arguments of an Attend: rows that follow one another after a text."""
    generator = torch.Generator(device).manual_seed(0)
    span = text + rows

    def numbers(heads: int, length: int) -> Tensor:
        made = torch.empty(1, heads, length, shape.head_dim, dtype=shape.dtype, device=device)
        return made.normal_(generator=generator)

    mask = TreeMask.of(
        torch.ones(rows, rows, dtype=torch.bool, device=device).tril(),
        torch.arange(rows, device=device) + text,
        torch.tensor(text, device=device),
        span,
        shape.dtype,
        window=shape.window,
    )
    query = numbers(shape.heads, rows)
    key = numbers(shape.kv_heads, span)
    value = numbers(shape.kv_heads, span)
    return query, key, value, mask, shape.head_dim**-0.5, shape.softcap
