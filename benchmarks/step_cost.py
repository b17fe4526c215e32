"""What a step costs by its rows, for each quantization of backbone and heads.

    python benchmarks/step_cost.py MODEL_OR_SHAPE QUANT[:QUANT_HEADS] ...

MODEL is what --model takes, with its heads; SHAPE is a name of medusa_chat/shapes.py, whose random weights get random
heads. All are held in memory at once and take turns: a round times every quantization at every number of rows, so that
a slow moment of the machine falls on all alike. Medians are told, in milliseconds. A step of one row is a vanilla one;
the others run the heads too, and go through the ordinary Runner. Last on standard output: one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from medusa_chat.bench.plan import RandomModel
from medusa_chat.bench.shapes import random_engine
from medusa_chat.config import LoadOptions, Sampling
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees.accuracy import PUBLISHED, grow
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.machine.devices import choose_device, choose_dtype
from medusa_chat.model.linear.quantization import as_quant
from medusa_chat.model.loading import load_model
from medusa_chat.shapes import SHAPES

ROWS = (1, 4, 8, 16, 32, 64)


def main() -> None:
    options = parse()
    runners = {quant: runner(options, *quant.partition(":")[::2]) for quant in options.quants}
    times = measure(runners, options.length, options.rounds)
    table = Table("quantization", *(f"{rows} rows" for rows in ROWS))
    result = {}
    for quant, by_rows in times.items():
        result[quant] = {
            rows: round(statistics.median(seconds) * 1e3, 3) for rows, seconds in by_rows.items()
        }
        table.add_row(quant, *(f"{result[quant][rows]:.2f} ms" for rows in ROWS))
    Console(file=sys.stderr).print(table)
    each = next(iter(runners.values()))
    print(
        json.dumps(
            {
                "model": options.model,
                "device": str(each.backbone.device),
                "dtype": str(each.backbone.dtype)[6:],
                "threads": torch.get_num_threads(),
                "length": options.length,
                "rounds": options.rounds,
                "heads": each.heads.heads if each.heads else 0,
                "own_lm_heads": owns(each),
                "step_ms": result,
            }
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "model", metavar="MODEL_OR_SHAPE", help=f"what --model takes, or one of {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "quants", nargs="+", metavar="QUANT[:QUANT_HEADS]", help="heads are none without the second"
    )
    parser.add_argument("--heads", type=int, default=5, help="of a shape")
    parser.add_argument(
        "--shared", action="store_true", help="heads of a shape share the backbone's LM head"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


def runner(options: argparse.Namespace, quant: str, quant_heads: str) -> Runner:
    """A runner over the model in these quantizations, with an empty cache."""
    capacity = options.length + max(ROWS)
    if options.model not in SHAPES:
        spec = resolve_model(options.model, None, quant, quant_heads or "none")
        loaded = load_model(spec, LoadOptions(device=options.device, dtype=options.dtype))
        return Runner(loaded.backbone, loaded.heads, capacity)
    device = choose_device(options.device)
    dtype = choose_dtype(device, options.dtype)
    heads = as_quant(quant_heads or "none")
    wanted = RandomModel(options.model, as_quant(quant), heads, options.heads, not options.shared)
    return random_engine(wanted, capacity, device, dtype).runner


def owns(runner: Runner) -> bool:
    """Whether the heads have LM heads of their own."""
    own = getattr(runner.heads, "lm_heads", None)
    return own is not None and len(own) > 0


def measure(
    runners: dict[str, Runner], length: int, rounds: int
) -> dict[str, dict[int, list[float]]]:
    """Seconds of steps behind a blank text of `length` tokens, by quantization and rows."""
    rule = make_rule(Sampling())
    times: dict[str, dict[int, list[float]]] = {
        quant: {rows: [] for rows in ROWS} for quant in runners
    }
    trees = {}
    for quant, each in runners.items():
        each.prefill([0] * length, rule)
        heads = each.heads.heads if each.heads else 0
        accuracy = PUBLISHED.pruned(heads, 10)
        trees[quant] = {rows: grow(accuracy, rows)[0] if rows > 1 else Tree() for rows in ROWS}
    for turn in range(rounds + 1):
        for quant, each in runners.items():
            for rows, tree in trees[quant].items():
                each.cache.rewind(length)
                started = time.perf_counter()
                each.step(0, tree, rule)
                if turn:  # the first warms up
                    times[quant][rows].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
