"""How long the device waits for the host between two captured steps."""

from __future__ import annotations

from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from medusa_chat.decoding.graphs.static_step import StaticStep

if TYPE_CHECKING:
    from medusa_chat.config import Sampling
    from medusa_chat.decoding.engine import Engine


def host_gaps(engine: Engine, prompt: list[int], sampling: Sampling) -> dict[str, Any] | None:
    """Time from a step's result on the host to the start of the next step's programs, in a reply of the engine.

    All that the engine does in between is in it: text, copies, policy, the Step itself, and what the next step is told.

    Returns:
        {"steps", "median_ms", "p90_ms"}; None where steps are eager, or fewer than three were taken.
    """
    if engine.runner.fast is None:
        return None
    list(engine.generate(prompt, sampling))  # what is not recorded yet is recorded now
    static = engine.runner.fast
    if not isinstance(static, StaticStep):  # it could not be recorded
        return None
    gaps, finished = [], 0.0
    for step in engine.generate(prompt, sampling):
        if not step.nodes:
            continue
        if finished:
            gaps.append(static.started - finished)
        finished = static.finished
    if len(gaps) < 2:
        return None
    tenths = quantiles(gaps, n=10, method="inclusive")
    return {
        "steps": len(gaps),
        "median_ms": round(1000 * median(gaps), 4),
        "p90_ms": round(1000 * tenths[-1], 4),
    }
