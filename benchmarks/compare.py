"""Compare the acceptance length of several models with heads. Nothing is timed.

    python benchmarks/compare.py NAME=MODEL[:HEADS] ... [--count PROMPTS] [--prompts PROMPTS]

The script counts each model's accuracies on one set of prompts, as `medusa-chat calibrate` does,
and grows the best trees of 8 to 64 nodes from them. Then the model answers the other set, the
first two turns of each conversation. Greedy lengths follow from the ranks that the heads gave to
the answers. Typical ones (temperature 0.7) are decoded. `heads` lists the greedy length with 16
nodes if only the first 1, 2, ... heads are kept.

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
from medusa_chat.decoding.trees.growth import grow
from medusa_chat.prompts import Prompt, read_prompts
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.training.calibration import (
    SIZES,
    Ranks,
    acceptance_length,
    answers,
    calibrate,
    joint_ranks,
    rank_reply,
)

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.trees.accuracy import Accuracy

TYPICAL_NODES = (16, 64)


def main() -> None:
    options = parse()
    count = read_prompts(options.count, options.count_limit)
    prompts = read_prompts(options.prompts, options.limit)
    for named in options.models:
        name, _, source = named.partition("=")
        model, _, heads = source.partition(":")
        engine = medusa_chat.load(
            model, heads or None, tree="chain-3", probing=False, measured=False, copies=False
        )
        figures = measure(engine, count, prompts, options.max_new_tokens)
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
    return parser.parse_args()


def measure(
    engine: Engine, count: list[Prompt], prompts: list[Prompt], max_new_tokens: int
) -> dict[str, object]:
    """Count accuracies on `count` and measure acceptance lengths on `prompts`."""
    accuracy = calibrate(engine, count, max_new_tokens)
    replies = ranked(engine, prompts, max_new_tokens)
    fewer_heads = [accuracy.pruned(heads, 20) for heads in range(1, engine.heads + 1)]
    return {
        "top1": [round(row[0], 3) for row in accuracy.top],
        "greedy": {nodes: length(accuracy, nodes, replies) for nodes in SIZES},
        "heads": [length(fewer, 16, replies) for fewer in fewer_heads],
        "typical": {
            nodes: typical(engine, accuracy, nodes, prompts, max_new_tokens)
            for nodes in TYPICAL_NODES
        },
    }


def ranked(engine: Engine, prompts: list[Prompt], max_new_tokens: int) -> list[Ranks]:
    """The ranks that the heads gave to the tokens of every greedy reply."""
    found = []
    sampling = Sampling(max_new_tokens=max_new_tokens)
    for prompt in prompts:
        for ids, steps in answers(engine, prompt, sampling):
            reply = [token.id for step in steps for token in step.tokens]
            found.append(joint_ranks(rank_reply(engine, ids, reply)))
    return found


def length(accuracy: Accuracy, nodes: int, replies: list[Ranks]) -> float:
    """Acceptance length of the best tree of so many nodes."""
    found = acceptance_length(grow(accuracy, nodes)[0], replies)
    assert found is not None, "no reply has a second token"
    return round(found, 3)


def typical(
    engine: Engine, accuracy: Accuracy, nodes: int, prompts: list[Prompt], max_new_tokens: int
) -> float:
    """Acceptance length of typical decoding."""
    engine.trees.use(grow(accuracy, nodes)[0])
    sampling = Sampling(mode="typical", temperature=0.7, max_new_tokens=max_new_tokens)
    stats = Stats()
    for prompt in prompts:
        for _, steps in answers(engine, prompt, sampling):
            for step in steps:
                stats.add(step)
    return round(stats.acceptance_length or 0.0, 3)


if __name__ == "__main__":
    sys.exit(main())
