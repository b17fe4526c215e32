"""Time that the device waits for the host between two captured steps."""

from __future__ import annotations

from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from medusa_chat.decoding.graphs.static_step import StaticStep

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.sampling import Sampling


def host_gaps(engine: Engine, prompt: list[int], sampling: Sampling) -> dict[str, Any] | None:
    """Time from one step's result on the host to the start of the next step's programs.

    All that the engine does in between counts: text, copies, policy, the Step, the next input.

    Returns:
        {"steps", "median_ms", "p90_ms"}; None if steps are eager or fewer than three were taken.
    """
    if engine.runner.fast is not None:
        list(engine.generate(prompt, sampling))  # captures the steps, or makes them eager
    static = engine.runner.fast
    if not isinstance(static, StaticStep):
        return None
    # At a step's yield the next one was launched already; after the last step none is.
    times = [
        static.started - static.finished for step in engine.generate(prompt, sampling) if step.nodes
    ]
    gaps = [gap for gap in times if gap > 0]
    if len(gaps) < 2:
        return None
    tenths = quantiles(gaps, n=10, method="inclusive")
    return {
        "steps": len(gaps),
        "median_ms": round(1000 * median(gaps), 4),
        "p90_ms": round(1000 * tenths[-1], 4),
    }
