"""Compare the acceptance length of several models with heads. Nothing is timed.

    python benchmarks/compare.py NAME=MODEL[:HEADS] ... [--count PROMPTS] [--prompts PROMPTS]

The script counts each model's accuracies on one set of prompts, as `medusa-chat calibrate` does.
Then the model answers the other set, the first two turns of each conversation, in every mode with
the dynamic and the static tree of each size, without copies. Typical and exact replies are at
temperature 0.7. `--kept` reads the accuracies next to the heads instead of counting.

Both sets are the prompts of `medusa-chat bench` unless others are named. Lengths on the prompts
that were counted are too high, so name two different sets for a comparison that you report.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import medusa_chat
from medusa_chat.config import SHIPPED_PROMPTS
from medusa_chat.prompts import Prompt, read_prompts
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.training.calibration import calibrate
from medusa_chat.training.observations import answers

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.sampling import Mode

MODES: tuple[Mode, ...] = ("greedy", "typical", "exact")


def main() -> None:
    options = parse()
    count = read_prompts(options.count, options.count_limit)
    prompts = read_prompts(options.prompts, options.limit)
    for named in options.models:
        name, _, source = named.partition("=")
        model, _, heads = source.partition(":")
        settings = {"tree": "chain-1", "probing": False, "copies": False}
        accuracy = None
        if not options.kept:
            counting = medusa_chat.load(
                model or None, heads or None, engine="torch", measured=False, **settings
            )
            accuracy = calibrate(counting, count, options.max_new_tokens)
            counting.close()
        engine = medusa_chat.load(model or None, heads or None, **settings)
        if accuracy:
            engine.trees.use_accuracy(accuracy)
        figures = measure(engine, prompts, options)
        print(json.dumps({"name": name, **figures}), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL[:HEADS]")
    files = {"type": Path, "nargs": "+", "default": [SHIPPED_PROMPTS]}
    parser.add_argument("--count", **files, help="prompts to count accuracies on")
    parser.add_argument("--count-limit", type=int, default=120)
    parser.add_argument("--prompts", **files, help="prompts to measure lengths on")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--kinds", nargs="+", default=["dynamic", "static"])
    parser.add_argument("--kept", action="store_true", help="read the accuracies that were kept")
    return parser.parse_args()


def measure(
    engine: Engine, prompts: list[Prompt], options: argparse.Namespace
) -> dict[str, object]:
    """Measure acceptance lengths, by mode, kind of tree and nodes."""
    accuracy = engine.trees.accuracy
    found: dict[str, object] = {}
    for mode in MODES:
        for kind in options.kinds:
            found[f"{mode} {kind}"] = {
                nodes: length(engine, mode, f"{kind}-{nodes}", prompts, options.max_new_tokens)
                for nodes in options.sizes
            }
    return {"top1": top1(accuracy), "exact top1": top1(accuracy and accuracy.exact), **found}


def top1(accuracy: Accuracy | None) -> list[float]:
    return [round(row[0], 3) for row in accuracy.top] if accuracy else []


def length(engine: Engine, mode: Mode, tree: str, prompts: list[Prompt], tokens: int) -> float:
    """Measure the acceptance length of replies in a mode with a tree."""
    engine.trees.use(tree)
    stats = Stats()
    for number, prompt in enumerate(prompts):
        sampling = Sampling(mode=mode, temperature=0.7, seed=number, max_new_tokens=tokens)
        for _, steps in answers(engine, prompt, sampling):
            for step in steps:
                stats.add(step)
    return round(stats.acceptance_length or 0.0, 3)


if __name__ == "__main__":
    sys.exit(main())
