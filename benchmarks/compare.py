"""Acceptance length of several models with heads: what a recipe, a head or a layer brings. Nothing is timed.

    python benchmarks/compare.py NAME=MODEL[:HEADS] ... --count TRAIN_PROMPTS --prompts VALID_PROMPTS

For each, accuracies are counted on one set of prompts, as `medusa-chat calibrate` does, and the best trees of 8 to 64
nodes grown from them; then the model answers the other set, the first two turns of each conversation. Greedy lengths
follow from the ranks that the heads give to what was answered; typical ones (temperature 0.7) are decoded. `heads`
lists the greedy length with 16 nodes if only the first 1, 2, ... heads are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import medusa_chat
from medusa_chat.config import Sampling
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.decoding.trees.growth import grow
from medusa_chat.prompts import Prompt, read_prompts
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

TYPICAL = (16, 64)  # nodes


def main() -> None:
    options = parse()
    count, prompts = (
        read_prompts(options.count, options.count_limit),
        read_prompts(options.prompts, options.limit),
    )
    for named in options.models:
        name, _, place = named.partition("=")
        model, _, heads = place.partition(":")
        engine = medusa_chat.load(
            model, heads or None, tree="chain-3", probing=False, measured=False, copies=False
        )
        print(
            json.dumps({"name": name, **measure(engine, count, prompts, options.max_new_tokens)}),
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL[:HEADS]")
    parser.add_argument(
        "--count",
        type=Path,
        nargs="+",
        required=True,
        help="prompts that accuracies are counted on",
    )
    parser.add_argument("--count-limit", type=int, default=120)
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        required=True,
        help="prompts that lengths are measured on",
    )
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    return parser.parse_args()


def measure(
    engine: Engine, count: list[Prompt], prompts: list[Prompt], max_new_tokens: int
) -> dict[str, object]:
    """Accuracy on `count`, acceptance lengths on `prompts`."""
    accuracy = calibrate(engine, count, max_new_tokens)
    replies = ranked(engine, prompts, max_new_tokens)
    return {
        "top1": [round(row[0], 3) for row in accuracy.top],
        "greedy": {nodes: length(accuracy, nodes, replies) for nodes in SIZES},
        "heads": [length(accuracy.pruned(k, 20), 16, replies) for k in range(1, engine.heads + 1)],
        "typical": {
            nodes: typical(engine, accuracy, nodes, prompts, max_new_tokens) for nodes in TYPICAL
        },
    }


def ranked(engine: Engine, prompts: list[Prompt], max_new_tokens: int) -> list[Ranks]:
    """For every greedy reply, the ranks at which the heads held what followed."""
    found = []
    for prompt in prompts:
        for ids, steps in answers(engine, prompt, Sampling(max_new_tokens=max_new_tokens)):
            found.append(
                joint_ranks(
                    rank_reply(engine, ids, [token.id for step in steps for token in step.tokens])
                )
            )
    return found


def length(accuracy: Accuracy, nodes: int, replies: list[Ranks]) -> float:
    found = acceptance_length(grow(accuracy, nodes)[0], replies)
    assert found is not None, "no reply has a second token"
    return round(found, 3)


def typical(
    engine: Engine, accuracy: Accuracy, nodes: int, prompts: list[Prompt], max_new_tokens: int
) -> float:
    engine.trees.use(grow(accuracy, nodes)[0])
    sampling = Sampling(mode="typical", temperature=0.7, max_new_tokens=max_new_tokens)
    stats = Stats.of(
        step
        for prompt in prompts
        for _, steps in answers(engine, prompt, sampling)
        for step in steps
    )
    return round(stats.tree_tokens / stats.tree_steps, 3)


if __name__ == "__main__":
    sys.exit(main())
