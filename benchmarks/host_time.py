"""Host time between recorded steps, without a GPU: all that the engine does in Python.

    python benchmarks/host_time.py [STEPS]

A tiny random model takes steps of 16 nodes over buffers that never move. The recorded programs are
replaced by nothing once they have run, so a step costs what it costs the host: choosing, packing,
starting, unpacking, text, learning. A GPU adds the start of three graphs, about 0.01 ms each.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median, quantiles
from typing import TYPE_CHECKING

from medusa_chat.decoding import fast
from medusa_chat.sampling import Sampling
from tests.helpers.tiny import make_engine, prompt_ids, random_backbone, random_heads

if TYPE_CHECKING:
    from medusa_chat.decoding.graphs.capture import Key, Program

NODES = 16


def measure(steps: int, **settings: bool) -> dict[str, float]:
    """Milliseconds of a step on the host: median and 90th percentile."""
    ready = False

    def record(_key: Key, program: Program) -> Program:
        def replay() -> None:
            if not ready:
                program()

        return replay

    fast.not_recorded = record
    backbone = random_backbone("llama", 320)
    engine = make_engine(
        backbone, random_heads(backbone), f"static-{NODES}", eager=False, **settings
    )
    sampling = Sampling(max_new_tokens=10 * steps)
    list(engine.generate(prompt_ids(40), Sampling(max_new_tokens=12)))
    engine.forget()
    reply = engine.generate(prompt_ids(40), sampling)
    next(reply)
    ready = True
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        if next(reply, None) is None:
            break
        times.append(1000 * (time.perf_counter() - started))
    reply.close()
    tenths = quantiles(times, n=10)
    return {
        "steps": len(times),
        "median_ms": round(median(times), 4),
        "p90_ms": round(tenths[-1], 4),
    }


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    for copies in (False, True):
        print(json.dumps({"copies": copies} | measure(count, copies=copies)))
