"""The kernels of a layer's small operations on a GPU, where they work and are right."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import torch

from medusa_chat.model.fused import plain
from medusa_chat.model.fused.plain import ACTIVATIONS, NORMS
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from torch import Tensor

    from medusa_chat.model.fused.plain import Operations

SWITCH = "MEDUSA_CHAT_LAYERS"  # plain: leave the kernels out
TOLERANCE = 0.01  # relative to the largest number
SIZE, ROWS, HEADS = 96, 3, 2  # of the check


def choose_operations(device: torch.device, dtype: torch.dtype) -> tuple[Operations | None, str]:
    """Return the kernels for a device; None and the reason where transformers' own layers run."""
    if device.type != "cuda":
        return None, ""
    if os.environ.get(SWITCH) == "plain":
        return None, f"{SWITCH}=plain"
    try:
        from medusa_chat.model.fused import kernels

        operations = cast("Operations", kernels)
        check(operations, device, dtype)
    except Exception as error:  # compilers, drivers and a missing Triton raise many kinds
        return None, f"{type(error).__name__}: {reason_of(error)}"
    return operations, ""


def check(operations: Operations, device: torch.device, dtype: torch.dtype) -> None:
    """Run each operation once; raise ArithmeticError if one is off by more than rounding."""
    reference = cast("Operations", plain)
    pairs = zip(
        _results(operations, device, dtype), _results(reference, device, dtype), strict=True
    )
    for ours, theirs in pairs:
        off = (ours.float() - theirs.float()).abs().max().item()
        largest = theirs.float().abs().max().item()
        if not off <= TOLERANCE * largest:
            raise ArithmeticError(f"off by {off:.2g} of {largest:.2g}")


def _results(operations: Operations, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)

    rows, weight = numbers(ROWS, SIZE), numbers(SIZE)
    found = [operations.norm(rows, weight, 1e-6, kind) for kind in NORMS]
    gates, factors = numbers(ROWS, 2 * SIZE).chunk(2, -1)
    found += [operations.gate(gates, factors, kind) for kind in ACTIVATIONS]
    new = numbers(1, HEADS, ROWS, SIZE), numbers(1, HEADS, ROWS, SIZE)
    turn = numbers(1, ROWS, SIZE), numbers(1, ROWS, SIZE)
    keys, values = numbers(2, 1, HEADS, 2 * ROWS, SIZE)
    places = torch.arange(ROWS, device=device) + 1
    query = operations.rotate(numbers(1, 2 * HEADS, ROWS, SIZE), new, turn, (keys, values, places))
    return [*found, query, keys, values]
