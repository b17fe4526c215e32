"""Record programs of tensors as CUDA graphs: the launches of a whole step become a few."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads

Program = Callable[[], None]
Key = tuple[Hashable, ...]
# Makes of a program one that does the same at every call. It may run the program first.
Record = Callable[[Key, Program], Program]


def capturable(backbone: Backbone, heads: Heads | None) -> bool:
    """Tell if steps can be recorded, as far as that is known without an attempt.

    Hooks of the host copy tensors on another device to this one in each forward, and bitsandbytes'
    int8 looks for outliers. By their sources these read nothing on the host: bitsandbytes' 4-bit
    layers (0.50), plain layers, RoPE as Backbone leaves it, sorts and top-k. The attempt shows the
    rest, and ends in eager steps if it fails.
    """
    if backbone.device.type != "cuda":
        return False
    modules = [
        *backbone.model.modules(),
        *(heads.modules() if isinstance(heads, nn.Module) else ()),
    ]
    return all(stays_on(backbone.device, module) for module in modules)


def stays_on(device: torch.device, module: nn.Module) -> bool:
    """Tell if a layer, apart from those in it, computes on a device without the host."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    local = all(tensor.device == device for tensor in tensors)
    return local and type(module).__name__ != "Linear8bitLt"


class CudaGraphs:
    """Records programs in one pool of memory: none leaves anything there that another one reads.

    Attributes:
        stream: where programs are warmed up and recorded. Warm-ups run there too, or cuBLAS would
            take its workspace for that stream out of the pool.
        pool: the memory that the graphs share.
        first: the first graph in the pool, which keeps it: a pool whose graphs are all gone can't
            be recorded into again.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.first: torch.cuda.CUDAGraph | None = None

    def __call__(self, _key: Key, program: Program) -> Program:
        """Warm a program up, record it, and return what replays it on the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        self._warm_up(program, current)
        graph = torch.cuda.CUDAGraph()
        # Another thread of the process may use CUDA meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with recording:
                program()
        except BaseException:
            # torch leaves its own stream in place if the recording does not end well.
            torch.cuda.set_stream(current)
            self._abandon_pool()
            take_up_error(self.stream.device)
            raise
        self.first = self.first or graph
        return graph.replay

    def _warm_up(self, program: Program, current: torch.cuda.Stream) -> None:
        """Compile, choose and configure kernels; then run as in the recording.

        A wait for the host fails here, because one that fails in a recording breaks the allocator.
        """
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                program()
                with waits_refused():
                    program()
        finally:
            # What began there may still write, even if a warm-up failed.
            current.wait_stream(self.stream)

    def _abandon_pool(self) -> None:
        """End what torch 2.11 leaves open after a recording that failed; later, take a new pool."""
        device = self.stream.device.index
        with suppress(RuntimeError):  # a torch that has ended it by itself
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        self.first = None


def take_up_error(device: torch.device) -> None:
    """Clear an error that CUDA still holds: bitsandbytes would end the process over it."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)  # each launch of torch asks for the last error


@contextmanager
def waits_refused() -> Iterator[None]:
    """Make operations that wait for the device raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's collector from freeing an older graph, which would spoil a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def not_recorded(_key: Key, program: Program) -> Program:
    """Return the program itself, where nothing can be recorded."""
    return program
