"""Record programs of tensors as CUDA graphs: the launches of a whole step become a few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from medusa_chat.decoding.graphs.static_step import Key, Program
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads

# The first compiles, chooses and configures kernels; the second takes the way that is recorded.
WARM_UPS = 2


def capturable(backbone: Backbone, heads: Heads | None) -> bool:
    """Tell if steps can be recorded, as far as that is known without an attempt.

    In each forward, hooks of the host copy weights on another device to this one. The attempt shows
    the rest, and ends in eager steps if it fails: longrope before transformers 5.24, experts that
    the host looks up, quantizations other than bitsandbytes'.
    """
    if backbone.device.type != "cuda":
        return False
    weights = (
        weight
        for module in _modules(backbone, heads)
        for weight in module.parameters(recurse=False)
    )
    local = all(weight.device == backbone.device for weight in weights)
    return local and not reads_the_host(backbone, heads)


def reads_the_host(backbone: Backbone, heads: Heads | None) -> bool:
    """Tell if a forward of backbone or heads is known to look at values on the host.

    bitsandbytes' int8 does, for outliers, and dynamic RoPE of any kind of layer, which compares the
    position. By their sources these do not: bitsandbytes' 4-bit layers (0.50: kernels on the
    current stream that wait for nothing), plain layers, transformers' other kinds of RoPE, the
    sorts and top-k of the sampling.
    """
    int8 = any(type(module).__name__ == "Linear8bitLt" for module in _modules(backbone, heads))
    return int8 or any("dynamic" in kind for kind in _rope_types(backbone.config))


def _modules(backbone: Backbone, heads: Heads | None) -> list[nn.Module]:
    own = heads.modules() if isinstance(heads, nn.Module) else ()
    return [*backbone.model.modules(), *own]


def _rope_types(config: Any) -> list[str]:
    """List the kinds of RoPE that a config names: one, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in rope.values() if isinstance(each, dict)]
    return [str(each.get("rope_type", "default")) for each in (rope, *by_layer)]


class CudaGraphs:
    """Records programs in one pool of memory: none leaves anything there that another one reads.

    Attributes:
        stream: where programs are warmed up and recorded. Warm-ups run there too, or cuBLAS would
            take its workspace for that stream out of the pool.
        first: the first graph, whose pool all share; a pool whose graphs are all gone can't be
            recorded into again.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.first: torch.cuda.CUDAGraph | None = None

    def __call__(self, _key: Key, program: Program) -> Program:
        """Warm a program up, record it, and return what replays it on the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    program()
        finally:
            # What began there may still write, even if a warm-up failed.
            current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        pool = self.first.pool() if self.first else None
        # Another thread of the process may use CUDA meanwhile.
        recording = torch.cuda.graph(
            graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with recording:
                program()
        except BaseException:
            # torch leaves its own stream in place if the recording does not end well.
            torch.cuda.set_stream(current)
            raise
        self.first = self.first or graph
        return graph.replay


def not_recorded(_key: Key, program: Program) -> Program:
    """Return the program itself, where nothing can be recorded."""
    return program
