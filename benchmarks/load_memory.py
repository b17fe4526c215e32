"""Compare the memory that a load takes with the forecast of medusa_chat.machine.plans.

    python benchmarks/load_memory.py MODEL [QUANT [QUANT_HEADS [CONTEXT]]]

The script loads the model, answers a prompt and fills its cache. Meanwhile it samples the
process's anonymous memory. The result is the highest sample plus the pages of libraries at the
end. Pages of mapped checkpoints do not count, since the kernel can take them back. Linux, CPU only.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from statistics import median
from typing import TYPE_CHECKING

import medusa_chat
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.machine import memory, plans
from medusa_chat.native.library import likely
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from medusa_chat.config import Message

DEFAULTS = ["bundled", "auto", "auto", "1024"]


def resident(kind: str) -> int:
    """Bytes of this process's anonymous memory (RssAnon) or of its mapped files (RssFile)."""
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


class PeakSampler(threading.Thread):
    """Samples anonymous memory until it is stopped, and keeps the highest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            self.peak = max(self.peak, resident("RssAnon"))
            time.sleep(0.02)


def main() -> None:
    given = sys.argv[1:]
    model, quant, quant_heads, context = given + DEFAULTS[len(given) :]
    spec = resolve_model(model, None, quant, quant_heads)
    contents = memory.contents_of(spec)
    assert contents is not None, "the sizes of this model are not known"
    forecast = plans.plan(
        contents, plans.load_of(spec, "cpu", int(context), native=likely("cpu", "auto"))
    )
    asked = {"model": spec.name, "quant": spec.quant, "quant_heads": spec.quant_heads}
    measured = measure(model, quant, quant_heads, int(context))
    ratio = round(measured["peak"] / forecast.total, 4)
    forecasts = {"forecast": forecast.total, "parts": forecast.parts(), "ratio": ratio}
    print(json.dumps({**asked, "context": int(context), **forecasts, **measured}))


def measure(model: str, quant: str, quant_heads: str, context: int) -> dict[str, float]:
    """Load the model and answer a prompt; returns the memory and the time that this took."""
    sampler = PeakSampler()
    sampler.start()
    started = time.perf_counter()
    engine = medusa_chat.load(
        model,
        device="cpu",
        quant=quant,
        quant_heads=quant_heads,
        context=context,
        tree="chain-4",
        probing=False,
    )
    seconds = time.perf_counter() - started
    while_loading = sampler.peak
    engine.runner.cache.buffer.zero_()
    prompt: list[Message] = [{"role": "user", "content": "Hello"}]
    steps = list(engine.generate(prompt, Sampling(max_new_tokens=16, ignore_eos=True)))
    sampler.stopped = True
    sampler.join()
    return {
        "anonymous_while_loading": while_loading,
        "anonymous": sampler.peak,
        "peak": sampler.peak + resident("RssFile"),
        "load_seconds": round(seconds, 1),
        "tokens": sum(len(step.tokens) for step in steps),
        "median_step_seconds": median(step.seconds for step in steps),
    }


if __name__ == "__main__":
    main()
