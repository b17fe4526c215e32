"""Tensors of heads, each checked as it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import UserError
from medusa_chat.model.finite import all_finite

if TYPE_CHECKING:
    from medusa_chat.model.layouts.tensors import TensorFiles

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckedTensors:
    """The tensors of a file by name; every fault is a UserError that names file and tensor."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files

    def fault(self, text: str) -> UserError:
        """Return the error for a fault of this file."""
        return UserError(f"{self.files.path}: {text}")

    def get(self, name: str) -> Tensor:
        """Return a tensor of floating-point numbers of 16 bits or more."""
        tensor = self.files.get(name)
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise self.fault(f"tensor {name} holds {kind}, not numbers of 16 bits or more")
        return tensor

    def finite(self, name: str) -> Tensor:
        """Return a tensor without NaN or infinity."""
        tensor = self.get(name)
        if not all_finite(tensor):
            raise self.fault(f"tensor {name} holds NaN or infinity; the heads are damaged")
        return tensor

    def fill(self, name: str, target: Tensor) -> None:
        """Copy a tensor to `target`, whose shape it must have."""
        self.check_shape(name, tuple(target.shape))
        target.copy_(self.finite(name))
        self.check_range(name, target)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape."""
        found = tuple(self.get(name).shape)
        if found != shape:
            raise self.fault(
                f"tensor {name} has shape {list(found)}, the backbone needs {list(shape)};"
                " were these heads trained for another model?"
            )

    def check_range(self, name: str, target: Tensor) -> None:
        """Refuse numbers that overflowed when they were copied to float16."""
        if target.dtype == torch.float16 and not all_finite(target):
            raise self.fault(
                f"tensor {name} holds numbers too large for float16; bfloat16 takes them"
            )
