"""Measure one forward of the native step by its rows, and prefill, beside the memory's limit.

    python benchmarks/native_rows.py MODEL_OR_SHAPE FORMAT ...

MODEL is a value of --model, SHAPE a name of medusa_chat/shapes.py (random weights). FORMAT is
bfloat16, float32, int8 or nf4. All formats are held in memory and take turns: a round times every
format at every number of rows. A forward runs the rows as a chain behind the text, with the LM head
and the argmax of each; no heads run. The results are medians in milliseconds. The last line on
standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from medusa_chat.bench.bandwidth import BUFFER, read_limit, torch_threads
from medusa_chat.bench.random_engine import RandomModel, random_engine
from medusa_chat.config import LoadOptions
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.model.loading import load_model
from medusa_chat.native.packed import variant
from medusa_chat.native.step import NativeStep
from medusa_chat.shapes import SHAPES

if TYPE_CHECKING:
    from medusa_chat.model.backbone import Backbone

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
CPU = torch.device("cpu")


def main() -> None:
    options = parse()
    steps = {name: make_step(options, name) for name in options.formats}
    with torch_threads(options.threads):
        rate = read_limit(CPU, BUFFER // 2)
    limits = {name: floor(step, options.length, rate) for name, step in steps.items()}
    times = measure(steps, options)
    show(times, limits)
    first = next(iter(steps.values()))
    print(json.dumps(about(options, first, rate) | {"floor_ms": limits, "ms": times}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ", ".join(SHAPES)
    parser.add_argument("model", metavar="MODEL_OR_SHAPE", help=f"a --model, or one of {names}")
    parser.add_argument("formats", nargs="+", metavar="FORMAT")
    parser.add_argument("--length", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def make_step(options: argparse.Namespace, name: str) -> NativeStep:
    """Pack a model in a format, and put a text of `--length` tokens behind it."""
    quant = {"bfloat16": "none", "float32": "none"}.get(name, name)
    dtype = "float32" if name == "float32" else "bfloat16"
    capacity = max(options.length, options.prefill) + max(ROW_COUNTS)
    settings = LoadOptions(device="cpu", dtype=dtype, engine="native", threads=options.threads)
    backbone: Backbone
    if options.model in SHAPES:
        wanted = RandomModel(options.model, quant, quant, heads=1)
        backbone = random_engine(wanted, capacity, CPU, settings).backbone
    else:
        backbone = load_model(resolve_model(options.model, None, quant), settings).backbone
    packed = backbone.native
    assert packed is not None
    return NativeStep(packed.model, None, packed.team, backbone.new_cache(capacity))


def floor(step: NativeStep, length: int, rate: float) -> float:
    """Milliseconds of reading a forward's bytes once at `rate` bytes/s."""
    cache = step.cache.buffer
    size = step.model.step_bytes + cache.nbytes // cache.shape[3] * length
    return round(1e3 * size / rate, 3)


def measure(
    steps: dict[str, NativeStep], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median milliseconds by format and rows; `prefill` has those of a whole prompt."""
    times: dict[str, dict[str, list[float]]] = {
        name: {str(rows): [] for rows in ROW_COUNTS} for name in steps
    }
    for step in steps.values():
        step.cache.rewind(0)
        step.prefill([1] * options.length)
    for _ in range(options.rounds):
        for name, step in steps.items():
            for rows in ROW_COUNTS:
                tokens, parents = list(range(rows)), [max(0, row - 1) for row in range(rows)]
                started = time.perf_counter()
                step.chosen(tokens, parents, greedy=True)
                times[name][str(rows)].append(time.perf_counter() - started)
    for name, step in steps.items():
        if options.prefill:
            times[name]["prefill"] = prefills(step, options)
    return {
        name: {rows: round(1e3 * median(taken), 3) for rows, taken in by_rows.items()}
        for name, by_rows in times.items()
    }


def prefills(step: NativeStep, options: argparse.Namespace) -> list[float]:
    """Seconds of prefilling `--prefill` tokens, a few times."""
    taken = []
    for _ in range(3):
        step.cache.rewind(0)
        started = time.perf_counter()
        step.prefill([number % 1000 for number in range(options.prefill)])
        taken.append(time.perf_counter() - started)
    return taken


def show(times: dict[str, dict[str, float]], limits: dict[str, float]) -> None:
    columns = next(iter(times.values()))
    table = Table("format", "limit", *columns)
    for name, by_rows in times.items():
        table.add_row(name, f"{limits[name]:.2f}", *(f"{value:.2f}" for value in by_rows.values()))
        ratios = (f"x{value / by_rows['1']:.2f}" for value in by_rows.values())
        table.add_row("", f"x{limits[name] / by_rows['1']:.2f}", *ratios)
    Console(file=sys.stderr, width=120).print(table)


def about(options: argparse.Namespace, step: NativeStep, rate: float) -> dict[str, Any]:
    """Describe the conditions of the measurement."""
    return {
        "model": options.model,
        "variant": variant(),
        "threads": step.team.threads,
        "length": options.length,
        "rounds": options.rounds,
        "prefill": options.prefill,
        "gb_per_second": round(rate / 1e9, 2),
    }


if __name__ == "__main__":
    main()
