"""Programs of tensors recorded as CUDA graphs: the launches of a whole step become a few."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from medusa_chat.decoding.static import Program
from medusa_chat.model.backbone import Backbone


def capturable(backbone: Backbone) -> bool:
    """Whether a step of this backbone can be recorded.

    bitsandbytes' int8 looks for outliers on the host, and dynamic RoPE compares the position there.
    """
    rope = getattr(backbone.config, "rope_parameters", None) or {}
    kinds = {type(module).__name__ for module in backbone.model.modules()}
    return backbone.device.type == "cuda" and "Linear8bitLt" not in kinds and rope.get("rope_type") != "dynamic"


class Captured:
    """Runs a program as it stands the first time and records it then; from the second time on it is replayed.

    The first run is a warm-up too: kernels are compiled, chosen and given their workspaces outside the recording.
    All graphs share one pool of memory: no program leaves anything in it that another one reads.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, program: Program) -> None:
        if key in self.graphs:
            self.graphs[key].replay()
            return
        program()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            program()
        self.graphs[key] = graph


def at_once(key: Hashable, program: Program) -> None:
    """Runs a program as it stands, where nothing can be recorded."""
    program()
