"""Attention over a fixed span on a GPU: by the Triton kernel or by torch's own, whichever is faster there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medusa_chat.machine.devices import last_level_cache
from medusa_chat.model.attention.tree_attention import Attend, TreeMask, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TORCH = "torch"
_LEAST = (8, 0)  # compute capability: before Ampere Triton has no matrix products in hardware
_TIMED_MS = 3.0
_TOLERANCE = {torch.float32: 1e-4}  # between two kernels, relative to the largest number
_TOLERANCE_16_BIT = 0.02


@dataclass(frozen=True)
class Choice:
    """What attends at one shape.

    Attributes:
        name: TORCH, or that of a launch of the kernel.
        milliseconds: of each that runs; empty where only torch's own does.
        failures: why the others do not.
    """

    name: str
    attend: Attend
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


class FasterAttention:
    """Attends as `plain` does. At the first use of a shape both are timed there, which no graph may be recording.

    Attributes:
        choices: by rows, rounded up to what takes as long, span, and whether a window cuts it.
    """

    def __init__(self) -> None:
        self.choices: dict[tuple[int, int, bool], Choice] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: TreeMask,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        rows = query.shape[2]
        shape = (
            1 if rows == 1 else max(16, 1 << (rows - 1).bit_length()),
            mask.span,
            mask.window is not None,
        )
        if shape not in self.choices:
            self.choices[shape] = choose(query, key, value, mask, scaling, softcap)
        return self.choices[shape].attend(query, key, value, mask, scaling, softcap)

    def told(self) -> list[dict[str, Any]]:
        """What was measured and chosen, shape by shape."""
        return [
            {
                "rows": rows,
                "span": span,
                "window": windowed,
                "taken": choice.name,
                "ms": {name: round(ms, 5) for name, ms in choice.milliseconds.items()},
                "failures": dict(choice.failures),
            }
            for (rows, span, windowed), choice in self.choices.items()
        ]


def choose(
    query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scaling: float, softcap: float | None
) -> Choice:
    """Time attention over random numbers of these shapes behind a text of three quarters of the span."""
    device = query.device
    random = torch.Generator(device).manual_seed(0)
    try:
        query, key, value = (
            torch.empty_like(each).normal_(generator=random) for each in (query, key, value)
        )
        behind = mask.behind(max(mask.span * 3 // 4 - query.shape[2], 0))
        ways = kernels(device) | {TORCH: plain}
        calls = {
            name: partial(attend, query, key, value, behind, scaling, softcap)
            for name, attend in ways.items()
        }
        expected, empty = calls[TORCH](), _milliseconds(lambda: None, device)
    except (
        Exception
    ) as error:  # whatever a missing or foreign Triton raises, or a GPU without the memory
        return Choice(TORCH, plain, failures={"triton": _line(error)})
    milliseconds, failures = {}, {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _check(call(), expected)
                milliseconds[name] = _milliseconds(call, device) - empty
        except Exception as error:  # whatever a compiler or a driver raises
            failures[name] = _line(error)
    best = min(milliseconds, key=milliseconds.__getitem__, default=TORCH)
    return Choice(best, ways[best], milliseconds, failures)


def kernels(device: torch.device) -> dict[str, Attend]:
    """The kernel in the launches worth timing. Raises whatever says that it cannot be had."""
    if torch.cuda.get_device_capability(device) < _LEAST:
        raise NotImplementedError("Triton multiplies matrices from compute capability 8.0 on")
    from medusa_chat.model.attention.kernel import attend, launches

    found = launches(torch.cuda.get_device_properties(device).multi_processor_count)
    return {f"triton {launch}": partial(attend, launch=launch) for launch in found}


def _check(ours: Tensor, theirs: Tensor) -> None:
    """A kernel that was compiled wrong may be fast, but not taken."""
    off, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not off <= _TOLERANCE.get(ours.dtype, _TOLERANCE_16_BIT) * largest:
        raise ArithmeticError(f"off by {off:.2g} of {largest:.2g}")


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call in a graph, as among the matrix products of a step: nothing of the keys is in the GPU's cache.

    The reading that sees to that is timed with it.
    """
    from triton.testing import do_bench_cudagraph

    waste = torch.zeros(
        last_level_cache(device) // 2, device=device
    )  # float32: twice as many bytes

    def run() -> None:
        waste.sum()
        call()

    return float(do_bench_cudagraph(run, rep=_TIMED_MS, return_mode="median"))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
