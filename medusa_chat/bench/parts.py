"""Time of a step, part by part: real steps of the ordinary engine."""

from __future__ import annotations

import time
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.decoding.native_step import NativeProgram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.runner import Runner
    from medusa_chat.sampling import Sampling

STEP_PARTS = ("forward", "heads", "acceptance", "commit")
OTHER = "rest"  # detokenizing, Python, and on a GPU the time in which it waits


class Stopwatch:
    """A value for `Runner.mark` that adds the time since the last mark to the part it names.

    On CUDA it records events on the stream, so that nothing waits. Elsewhere a part is over when
    its call returns.

    Args:
        clock: seconds, in place of the device's own.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self._cuda = device.type == "cuda" and clock is None
        self._clock = clock or time.perf_counter
        self._times: list[Any] = []
        self.marks: list[str] = []

    def __call__(self, part: str) -> None:
        """End the part `part` of a step; `begin` starts a step."""
        self.marks.append(part)
        self._times.append(self._now())

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each part, step by step."""
        if self._cuda:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        before: Any = None
        for part, now in zip(self.marks, self._times, strict=True):
            if part == "begin":
                found.append({})
            else:
                found[-1][part] = found[-1].get(part, 0.0) + self._between(before, now)
            before = now
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, now: Any) -> float:
        seconds: float = before.elapsed_time(now) / 1000 if self._cuda else now - before
        return seconds


class Observed:
    """The parts that native steps report by themselves."""

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []

    def __call__(self, parts: dict[str, float]) -> None:
        """Note the parts of a step."""
        self._steps.append(parts)

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each part, step by step."""
        return self._steps


@contextmanager
def watching(runner: Runner) -> Iterator[Stopwatch | Observed]:
    """Time the parts of the runner's steps inside the block."""
    program = runner.fast
    if isinstance(program, NativeProgram):
        program.observe = observed = Observed()
        try:
            yield observed
        finally:
            program.observe = None
        return
    stopwatch = Stopwatch(runner.backbone.device)
    before = runner.eager.mark
    runner.eager.mark = stopwatch
    try:
        yield stopwatch
    finally:
        runner.eager.mark = before


def step_parts(
    engine: Engine, prompts: Sequence[list[int]], sampling: Sampling
) -> dict[str, Any] | None:
    """Median milliseconds of each part of the steps that answer the prompts, and their shares.

    The first prompt is answered once before, untimed.

    Returns:
        {"step_ms", "ms": {part: ...}, "shares": {part: ...}, "outside_forward"}; None if no step
        was taken, or if the runner cannot time parts, as with captured steps.
    """
    list(engine.generate(prompts[0], sampling))
    wholes: list[float] = []
    with watching(engine.runner) as stopwatch:
        for prompt in prompts:
            wholes += [step.seconds for step in engine.generate(prompt, sampling) if step.nodes]
    timed = stopwatch.steps()
    return _summary(wholes, timed) if timed else None


def _summary(wholes: Sequence[float], timed: Sequence[dict[str, float]]) -> dict[str, Any]:
    ms = {part: 1000 * median(step.get(part, 0.0) for step in timed) for part in STEP_PARTS}
    others = [
        max(whole - sum(parts.values()), 0.0) for whole, parts in zip(wholes, timed, strict=True)
    ]
    ms[OTHER] = 1000 * median(others)
    total = sum(ms.values())
    shares = {part: round(value / total, 4) for part, value in ms.items()}
    return {
        "step_ms": round(1000 * median(wholes), 4),
        "ms": {part: round(value, 4) for part, value in ms.items()},
        "shares": shares,
        "outside_forward": round(1 - shares["forward"], 4),
    }
