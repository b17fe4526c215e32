"""Facts of a GPU that explain the figures of `bench`: attention with masks, a step's kernels.

    python benchmarks/gpu_facts.py attention
    python benchmarks/gpu_facts.py profile bundled vicuna-7b:nf4

`attention` times torch's masked attention at three lengths in a row, with cuDNN on and off: a
backend that plans anew for each length is slow at all three. `profile` replays recorded steps of 16
nodes under torch's profiler: kernels and microseconds of a step, memory, seconds of recording.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import medusa_chat
from medusa_chat.bench.random_engine import parse_shapes, random_engine
from medusa_chat.config import LoadOptions
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine

CUDA = torch.device("cuda")
LENGTHS = (101, 102, 103)
NODES = "static-16"
REPLAYS = 20


def attention() -> dict[str, Any]:
    """Milliseconds of masked attention in bfloat16 at its first use of each length."""
    found = {}
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        found["cuDNN on" if cudnn else "cuDNN off"] = [first_use(length) for length in LENGTHS]
    return found


def first_use(length: int) -> float:
    query = torch.randn(1, 32, 16, 128, device=CUDA, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 32, length, 128, device=CUDA, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 16, length, device=CUDA, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    started = time.perf_counter()
    scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.cuda.synchronize()
    return round(1000 * (time.perf_counter() - started), 3)


def profile_steps(model: str) -> dict[str, Any]:
    """Kernels, memory and recording of an engine's steps."""
    engine = engine_of(model)
    engine.trees.use(NODES)
    prompt = list(range(1, 300))
    before = torch.cuda.memory_reserved()
    started = time.perf_counter()
    list(engine.generate(prompt, Sampling(max_new_tokens=8, ignore_eos=True)))
    recording = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        reply = engine.generate(prompt, Sampling(max_new_tokens=200, ignore_eos=True))
        steps = [step for step, _ in zip(reply, range(REPLAYS), strict=False)]
        reply.close()
    kernels = [event for event in seen.events() if event.device_type.name == "CUDA"]
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    return {
        "model": model,
        "kernels_a_step": round(len(kernels) / len(steps), 1),
        "microseconds_a_step": round(sum(k.device_time for k in kernels) / len(steps), 1),
        "wall_ms_a_step": round(1000 * sum(step.seconds for step in steps) / len(steps), 3),
        "first_reply_seconds": round(recording, 2),
        "reserved_by_recording": reserved - before,
        "reserved_and_not_allocated": reserved - allocated,
        "longest": longest(kernels),
        "notices": list(engine.notices),
    }


def longest(kernels: list[Any]) -> list[tuple[str, int, float]]:
    """The ten kernels that take the most time: name, count, microseconds."""
    sums: dict[str, list[float]] = {}
    for kernel in kernels:
        sums.setdefault(kernel.name[:80], []).append(kernel.device_time)
    ranked = sorted(sums.items(), key=lambda item: -sum(item[1]))
    return [(name, len(times), round(sum(times), 1)) for name, times in ranked[:10]]


def engine_of(model: str) -> Engine:
    options = LoadOptions(device="cuda", probing=False, copies=False)
    if model == "bundled":
        return medusa_chat.load(device="cuda", tree=NODES, probing=False, copies=False)
    (shape,) = parse_shapes(model, "none")
    return random_engine(shape, 1024, CUDA, options)


if __name__ == "__main__":
    what, *models = sys.argv[1:] or [""]
    if what == "attention":
        print(json.dumps(attention(), indent=2))
    elif what == "profile":
        for name in models or ["bundled"]:
            print(json.dumps(profile_steps(name), indent=2))
    else:
        sys.exit(__doc__)
