"""Programs of tensors recorded as CUDA graphs: the launches of a whole step become a few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from medusa_chat.decoding.graphs.static_step import Key, Program
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads

WARM_UPS = 2  # the first compiles, chooses and configures kernels, the second takes the way that is recorded


def capturable(backbone: Backbone, heads: Heads | None) -> bool:
    """Whether steps can be recorded, as far as that is known without an attempt.

    Weights on another device are copied to this one in each forward, by hooks of the host. The rest is left to the
    attempt, which ends in eager steps where it fails: longrope before transformers 5.24, experts that the host looks
    up, quantizations other than bitsandbytes'.
    """
    if backbone.device.type != "cuda":
        return False
    weights = [
        weight
        for module in _modules(backbone, heads)
        for weight in module.parameters(recurse=False)
    ]
    there = all(weight.device == backbone.device for weight in weights)
    return there and not reads_the_host(backbone, heads)


def reads_the_host(backbone: Backbone, heads: Heads | None) -> bool:
    """Whether a forward of backbone or heads is known to look at values on the host.

    bitsandbytes' int8 does, for outliers, and dynamic RoPE of any kind of layer, which compares the position. By their
    sources these do not: bitsandbytes' 4-bit layers (0.50: kernels on the current stream that wait for nothing), plain
    layers, transformers' other kinds of RoPE, the sorts and top-k of the sampling.
    """
    int8 = any(type(module).__name__ == "Linear8bitLt" for module in _modules(backbone, heads))
    return int8 or any("dynamic" in kind for kind in _rope_types(backbone.config))


def _modules(backbone: Backbone, heads: Heads | None) -> list[nn.Module]:
    return [*backbone.model.modules(), *(heads.modules() if heads is not None else ())]


def _rope_types(config: Any) -> list[str]:
    """The kinds of RoPE that a config names: one, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in rope.values() if isinstance(each, dict)]
    return [str(each.get("rope_type", "default")) for each in (rope, *by_layer)]


class Captured:
    """Records programs as CUDA graphs, all in one pool of memory: none leaves anything in it that another one reads."""

    def __init__(self, device: torch.device) -> None:
        # Warm-ups run on the stream that records, or cuBLAS would take its workspace for that stream out of the pool.
        self._stream = torch.cuda.Stream(device)
        # Its pool is that of all. It is kept because a pool whose graphs are all gone can't be recorded into again.
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, key: Key, program: Program) -> Program:
        """Run a program WARM_UPS times, record it, and return what replays it on the current stream."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    program()
        finally:
            current.wait_stream(
                self._stream
            )  # what began there may still write, whether or not all of it did
        graph, pool = torch.cuda.CUDAGraph(), self._first.pool() if self._first else None
        try:
            # In another thread of the process CUDA may be used meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                program()
        except BaseException:
            torch.cuda.set_stream(
                current
            )  # torch leaves its own in place if the recording does not end well
            raise
        self._first = self._first or graph
        return graph.replay


def as_it_is(key: Key, program: Program) -> Program:
    """The program itself, where nothing can be recorded."""
    return program
