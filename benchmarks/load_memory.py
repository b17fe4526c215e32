"""What a load really takes, beside what medusa_chat.machine.memory foretold.

    python benchmarks/load_memory.py MODEL [QUANT [QUANT_HEADS [CONTEXT]]]

Told is the most of anonymous memory, sampled while the model loads, answers a prompt and has its cache written full,
and the pages of libraries, as they are when all is done. Pages of mapped checkpoints do not count, since the kernel
takes them back at will. Linux, CPU only.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import medusa_chat
from medusa_chat.config import Sampling
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.machine import memory


def resident(kind: str) -> int:
    """Bytes of this process's memory that is no file's (RssAnon), or a file's (RssFile)."""
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


class Peak(threading.Thread):
    """Samples until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stopped = 0, False

    def run(self) -> None:
        while not self.stopped:
            self.most = max(self.most, resident("RssAnon"))
            time.sleep(0.02)


def main() -> None:
    asked = sys.argv[1:]
    model, quant, quant_heads, context = asked + ["bundled", "auto", "auto", "2048"][len(asked) :]
    spec = resolve_model(model, None, quant, quant_heads)
    contents = memory.contents_of(spec)
    assert contents is not None, "the sizes of this model are not known"
    foretold = memory.plan(contents, memory.load_of(spec, "cpu", int(context)))
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    engine = medusa_chat.load(
        model,
        device="cpu",
        quant=quant,
        quant_heads=quant_heads,
        context=int(context),
        tree="chain-4",
        probing=False,
    )
    while_loading, seconds = peak.most, time.perf_counter() - started
    engine.runner.cache.buffer.zero_()
    steps = list(
        engine.generate(
            [{"role": "user", "content": "Hello"}], Sampling(max_new_tokens=16, ignore_eos=True)
        )
    )
    peak.stopped = True
    peak.join()
    most = peak.most + resident("RssFile")
    print(
        json.dumps(
            {
                "model": engine.name,
                "quant": spec.quant,
                "quant_heads": spec.quant_heads,
                "context": int(context),
                "foretold": foretold.total,
                "parts": foretold.parts(),
                "anonymous_while_loading": while_loading,
                "anonymous": peak.most,
                "peak": most,
                "ratio": round(most / foretold.total, 4),
                "load_seconds": round(seconds, 1),
                "tokens": sum(len(step.tokens) for step in steps),
                "median_step_seconds": sorted(step.seconds for step in steps)[len(steps) // 2],
            }
        )
    )


if __name__ == "__main__":
    main()
