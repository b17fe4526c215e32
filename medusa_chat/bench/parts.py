"""Where the time of a step goes: real steps of the ordinary engine, timed part by part."""

from __future__ import annotations

import time
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medusa_chat.config import Sampling
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.runner import Runner
    from medusa_chat.events import Step

PARTS = ("forward", "heads", "acceptance", "commit")
REST = "rest"  # detokenizing, Python, and on a GPU the time in which it waits


class Stopwatch:
    """Takes the place of `EagerStep.mark`: the time since the mark before belongs to the part that a mark names.

    On CUDA events are recorded on the stream, so that nothing waits; elsewhere every part is over when it returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each part, step by step."""
        if self._cuda:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        before: Any = None
        for part, now in self._marks:
            if part == "begin":
                found.append({})
            else:
                found[-1][part] = found[-1].get(part, 0.0) + self._between(before, now)
            before = now
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, now: Any) -> float:
        return before.elapsed_time(now) / 1000 if self._cuda else now - before


@contextmanager
def watching(runner: Runner) -> Iterator[Stopwatch]:
    """Time the parts of the runner's steps while inside."""
    stopwatch, before = Stopwatch(runner.backbone.device), runner.eager.mark
    runner.eager.mark = stopwatch
    try:
        yield stopwatch
    finally:
        runner.eager.mark = before


def step_parts(
    engine: Engine, prompts: Sequence[list[int]], sampling: Sampling
) -> dict[str, Any] | None:
    """Median milliseconds of each part of the steps that answer the prompts, and the parts' shares of the step.

    Args:
        prompts: ids, one after the other; the first is answered once before, unwatched.

    Returns:
        {"step_ms", "ms": {part: ...}, "shares": {part: ...}, "outside_forward"}; None if no step was taken, or if
        the runner does not tell parts apart, as a captured one cannot.
    """
    list(engine.generate(prompts[0], sampling))
    steps: list[Step] = []
    with watching(engine.runner) as stopwatch:
        for prompt in prompts:
            steps += [step for step in engine.generate(prompt, sampling) if step.nodes]
    timed = stopwatch.steps()
    if not timed:
        return None
    wholes = [step.seconds for step in steps]
    ms = {part: 1000 * median(step.get(part, 0.0) for step in timed) for part in PARTS}
    rests = (
        max(whole - sum(parts.values()), 0.0) for whole, parts in zip(wholes, timed, strict=True)
    )
    ms[REST] = 1000 * median(rests)
    total = sum(ms.values())
    shares = {part: round(value / total, 4) for part, value in ms.items()}
    return {
        "step_ms": round(1000 * median(wholes), 4),
        "ms": {part: round(value, 4) for part, value in ms.items()},
        "shares": shares,
        "outside_forward": round(1 - shares["forward"], 4),
    }
