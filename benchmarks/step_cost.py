"""Measure the cost of a step by its rows, for each quantization of backbone and heads.

    python benchmarks/step_cost.py MODEL_OR_SHAPE QUANT[:QUANT_HEADS] ...

MODEL is a value of --model. SHAPE is a name of medusa_chat/shapes.py: the script makes a model and
heads of random weights. All quantizations are held in memory and take turns: a round times every
quantization at every number of rows, so that a slow moment of the machine affects all alike. The
results are medians in milliseconds. A step of one row is a vanilla one; the others run the heads
too. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median

from rich.console import Console
from rich.table import Table

from medusa_chat.bench.random_engine import RandomModel, random_engine
from medusa_chat.config import LoadOptions
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees.accuracy import PUBLISHED
from medusa_chat.decoding.trees.growth import grow
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.machine.devices import choose_device
from medusa_chat.model.linear.quantization import as_quant
from medusa_chat.model.loading import load_model
from medusa_chat.sampling import Sampling
from medusa_chat.shapes import SHAPES

ROW_COUNTS = (1, 4, 8, 16, 32, 64)

Times = dict[str, dict[int, list[float]]]  # seconds by quantization and rows


def main() -> None:
    options = parse()
    runners = {quant: make_runner(options, quant) for quant in options.quants}
    times = measure(runners, options.length, options.rounds)
    medians = {
        quant: {rows: round(1e3 * median(seconds), 3) for rows, seconds in by_rows.items()}
        for quant, by_rows in times.items()
    }
    show(medians)
    print(json.dumps(about(options, next(iter(runners.values()))) | {"step_ms": medians}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ", ".join(SHAPES)
    parser.add_argument(
        "model", metavar="MODEL_OR_SHAPE", help=f"a value of --model, or one of {names}"
    )
    parser.add_argument(
        "quants", nargs="+", metavar="QUANT[:QUANT_HEADS]", help="without QUANT_HEADS: none"
    )
    parser.add_argument("--heads", type=int, default=5, help="number of heads of a shape")
    parser.add_argument(
        "--shared", action="store_true", help="heads of a shape share the backbone's LM head"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="auto")
    return parser.parse_args()


def make_runner(options: argparse.Namespace, quants: str) -> Runner:
    """Make a runner over the model in QUANT[:QUANT_HEADS], with an empty cache."""
    quant, _, quant_heads = quants.partition(":")
    quant_heads = quant_heads or "none"
    capacity = options.length + max(ROW_COUNTS)
    settings = LoadOptions(device=options.device, dtype=options.dtype, engine=options.engine)
    if options.model not in SHAPES:
        spec = resolve_model(options.model, None, quant, quant_heads)
        loaded = load_model(spec, settings)
        return Runner(loaded.backbone, loaded.heads, capacity)
    device = choose_device(options.device)
    wanted = RandomModel(
        options.model, as_quant(quant), as_quant(quant_heads), options.heads, not options.shared
    )
    return random_engine(wanted, capacity, device, settings).runner


def measure(runners: dict[str, Runner], length: int, rounds: int) -> Times:
    """Time steps after a blank text of `length` tokens."""
    rule = make_rule(Sampling())
    times: Times = {}
    trees = {}
    for quant, runner in runners.items():
        runner.prefill([0] * length, rule)
        accuracy = PUBLISHED.pruned(runner.heads.heads if runner.heads else 0, 10)
        trees[quant] = {rows: grow(accuracy, rows)[0] for rows in ROW_COUNTS[1:]}
        trees[quant][1] = Tree()
        times[quant] = {rows: [] for rows in ROW_COUNTS}
    for number in range(rounds + 1):
        for quant, runner in runners.items():
            for rows, seconds in times[quant].items():
                runner.cache.rewind(length)
                started = time.perf_counter()
                runner.step(0, trees[quant][rows], rule)
                if number:  # the first round warms up
                    seconds.append(time.perf_counter() - started)
    return times


def show(medians: dict[str, dict[int, float]]) -> None:
    table = Table("quantization", *(f"{rows} rows" for rows in ROW_COUNTS))
    for quant, by_rows in medians.items():
        table.add_row(quant, *(f"{by_rows[rows]:.2f} ms" for rows in ROW_COUNTS))
    Console(file=sys.stderr).print(table)


def about(options: argparse.Namespace, runner: Runner) -> dict[str, object]:
    """Describe the conditions of the measurement."""
    heads = runner.heads
    own = getattr(heads, "lm_heads", None)
    own_lm_heads = getattr(heads, "own_lm_heads", own is not None and len(own) > 0)
    return {
        "model": options.model,
        "device": str(runner.backbone.device),
        "dtype": str(runner.backbone.dtype).removeprefix("torch."),
        "step": runner.backbone.step_name,
        "length": options.length,
        "rounds": options.rounds,
        "heads": runner.heads.heads if runner.heads else 0,
        "own_lm_heads": own_lm_heads,
    }


if __name__ == "__main__":
    main()
