"""A recording of tensor operations, replayed as a CUDA graph is: same operations and memory."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from medusa_chat.decoding.graphs.capture import Key, Program


class Tape(TorchDispatchMode):
    """Operations in order, with the tensors that they read and made.

    It refuses what a CUDA graph cannot record: a tensor's value, a shape that depends on it, and
    data of the host.
    """

    refused = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "lift_fresh",
        "item",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        assert name not in self.refused, f"{name} reads or needs the host"
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, tree_flatten(made)[0]))
        return made

    @torch.inference_mode()
    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            given = _memory([args, kwargs])
            for old, new in zip(made, tree_flatten(function(*args, **kwargs))[0], strict=True):
                # Views, and what was written in place, lie in the memory of what was given.
                if isinstance(old, Tensor) and not _memory(old) & given:
                    old.copy_(new)


def _memory(values: Any) -> set[int]:
    """Addresses of the tensors among these; empty ones and packed weights have none."""
    tensors = [
        value
        for value in tree_flatten(values)[0]
        if isinstance(value, Tensor) and value.layout == torch.strided
    ]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


class Recorder:
    """Stands in for CudaGraphs: warms a program up, records it, and returns what replays it.

    Attributes:
        made: how often each key was recorded; alive: recordings that somebody still holds.
    """

    def __init__(self) -> None:
        self.made: Counter[Key] = Counter()
        self.alive: weakref.WeakSet[Tape] = weakref.WeakSet()

    def __call__(self, key: Key, program: Program) -> Program:
        self.made[key] += 1
        program()
        tape = Tape()
        with tape:
            program()
        self.alive.add(tape)
        return tape.replay

    def kinds(self) -> Counter[str]:
        """How many different programs of each sort were recorded."""
        return Counter(str(key[0]) for key in self.made)
