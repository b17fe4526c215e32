"""Time of one layer's attention on a GPU, by the Triton kernel and by torch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.decoding.draft.base import BUCKETS
from medusa_chat.machine.devices import last_level_cache
from medusa_chat.model.attention.rule import TORCH, TRITON, random_inputs
from medusa_chat.model.attention.tree_attention import torch_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.model.backbone import Backbone

TIMED_MS = 3.0
TIMED_ROWS = BUCKETS[:5]


def attention_times(backbone: Backbone, contexts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Time attention of each number of rows after each number of positions.

    Returns:
        {"rows", "context", "taken": TORCH or TRITON, "ms": {name: milliseconds}}, one for each;
        "reason" says why the kernel does not run here. Empty on a CPU, and without Triton, which
        does the timing.
    """
    choice, device = backbone.attention, backbone.device
    ways = {TORCH: torch_attention, choice.name: choice.attend}
    if device.type != "cuda" or TRITON not in ways:
        return [{"taken": choice.name, "reason": choice.reason}] if choice.reason else []
    empty = time_in_graph(lambda: None, device)
    found = []
    for context in contexts:
        for rows in TIMED_ROWS:
            inputs = random_inputs(backbone.attention_shape, device, rows, context)
            ms = {
                name: round(time_in_graph(partial(way, *inputs), device) - empty, 5)
                for name, way in ways.items()
            }
            found.append({"rows": rows, "context": context, "taken": choice.name, "ms": ms})
    return found


def time_in_graph(call: Callable[[], object], device: torch.device) -> float:
    """Time a call in a CUDA graph, with no keys in the GPU's cache, as between a step's matmuls.

    Returns:
        Milliseconds, with those of emptying the cache.
    """
    from triton.testing import do_bench_cudagraph

    floats = last_level_cache(device) // 2  # of 4 bytes: twice as many bytes as the cache holds
    filler = torch.zeros(floats, device=device)

    def run() -> None:
        filler.sum()
        call()

    return float(do_bench_cudagraph(run, rep=TIMED_MS, return_mode="median"))
