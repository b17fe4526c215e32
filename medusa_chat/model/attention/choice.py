"""Attention over a fixed span on a GPU: the Triton kernel or torch, whichever is faster."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medusa_chat.machine.devices import last_level_cache
from medusa_chat.model.attention.tree_attention import Attend, TreeMask, torch_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TORCH = "torch"
LEAST_CAPABILITY = (8, 0)  # before Ampere, Triton has no matrix products in hardware
SMALLEST_TILE = 16  # rows up to this number take the kernel as long as one another
TIMED_MS = 3.0
TOLERANCE = {torch.float32: 1e-4}  # between two implementations, relative to the largest number
TOLERANCE_16_BIT = 0.02
LONGEST_FAILURE = 200  # characters of a reason in the report


@dataclass(frozen=True)
class Selected:
    """The implementation that attends at one shape.

    Attributes:
        name: TORCH, or the name of a launch of the kernel.
        attend: the implementation.
        milliseconds: time of each implementation that runs; empty if torch is the only one.
        failures: reason why each of the others does not run.
    """

    name: str
    attend: Attend
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


class FasterAttention:
    """An attention function that takes the faster of torch and the Triton kernel for each shape.

    It times both at the first use of a shape, so no CUDA graph may be recorded at that moment.

    Attributes:
        selected: by rows (rounded up to a tile), span, and whether a window limits it.
    """

    def __init__(self) -> None:
        self.selected: dict[tuple[int, int, bool], Selected] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: TreeMask,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attend as `torch_attention` does."""
        shape = _tile(query.shape[2]), mask.span, mask.window is not None
        if shape not in self.selected:
            self.selected[shape] = select(query, key, value, mask, scaling, softcap)
        return self.selected[shape].attend(query, key, value, mask, scaling, softcap)

    def report(self) -> list[dict[str, Any]]:
        """Return the times and the implementation taken, one entry for each shape."""
        return [
            {
                "rows": rows,
                "span": span,
                "window": windowed,
                "taken": selected.name,
                "ms": {name: round(ms, 5) for name, ms in selected.milliseconds.items()},
                "failures": dict(selected.failures),
            }
            for (rows, span, windowed), selected in self.selected.items()
        ]


def select(
    query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scaling: float, softcap: float | None
) -> Selected:
    """Time each implementation on random numbers, after a text of three quarters of the span."""
    device = query.device
    try:
        implementations = kernels(device) | {TORCH: torch_attention}
        query, key, value = _random_like(query, key, value)
        timed = mask.at_length(max(mask.span * 3 // 4 - query.shape[2], 0))
        calls = {
            name: partial(attend, query, key, value, timed, scaling, softcap)
            for name, attend in implementations.items()
        }
        expected = calls[TORCH]()
        overhead = time_in_graph(lambda: None, device)
    except Exception as error:  # a missing or foreign Triton raises many kinds; so does a full GPU
        return Selected(TORCH, torch_attention, failures={"triton": _reason(error)})
    milliseconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _check(call(), expected)
                milliseconds[name] = time_in_graph(call, device) - overhead
        except Exception as error:  # compilers and drivers raise many kinds
            failures[name] = _reason(error)
    best = min(milliseconds, key=milliseconds.__getitem__, default=TORCH)
    return Selected(best, implementations[best], milliseconds, failures)


def kernels(device: torch.device) -> dict[str, Attend]:
    """Return the kernel in each launch worth timing, by name.

    Raises:
        NotImplementedError: the GPU is too old.
        Exception: Triton is missing or does not work here.
    """
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise NotImplementedError("Triton multiplies matrices from compute capability 8.0 on")
    from medusa_chat.model.attention.kernel import attend, launches

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return {f"triton {launch}": partial(attend, launch=launch) for launch in launches(processors)}


def _tile(rows: int) -> int:
    """Round rows up to a number that takes the kernel the same time."""
    if rows == 1:
        return 1
    return max(SMALLEST_TILE, 1 << (rows - 1).bit_length())


def _random_like(*tensors: Tensor) -> list[Tensor]:
    generator = torch.Generator(tensors[0].device).manual_seed(0)
    return [torch.empty_like(each).normal_(generator=generator) for each in tensors]


def _check(ours: Tensor, theirs: Tensor) -> None:
    """Raise ArithmeticError if two results differ by more than rounding."""
    off = (ours - theirs).abs().max().item()
    largest = theirs.abs().max().item()
    if not off <= TOLERANCE.get(ours.dtype, TOLERANCE_16_BIT) * largest:
        raise ArithmeticError(f"off by {off:.2g} of {largest:.2g}")


def time_in_graph(call: Callable[[], object], device: torch.device) -> float:
    """Time a call in a CUDA graph, with no keys in the GPU's cache, as between a step's matmuls.

    The time includes that of emptying the cache.
    """
    from triton.testing import do_bench_cudagraph

    floats = last_level_cache(device) // 2  # of 4 bytes: twice as many bytes as the cache holds
    filler = torch.zeros(floats, device=device)

    def run() -> None:
        filler.sum()
        call()

    return float(do_bench_cudagraph(run, rep=TIMED_MS, return_mode="median"))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:LONGEST_FAILURE]
