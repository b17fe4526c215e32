"""Cost of a step by its nodes, the tree that follows, and its share of the memory's limit."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.bandwidth import step_bytes
from medusa_chat.config import MAX_NODES, UserError
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.choice import StepCost, fastest, options
from medusa_chat.decoding.trees.costs import measure
from medusa_chat.decoding.trees.growth import kinds

if TYPE_CHECKING:
    from medusa_chat.bench.job import Tick
    from medusa_chat.decoding.engine import Engine

SIMULATED = (
    "published accuracies of the Vicuna-7B Medusa-1 heads"
    " (FasterDecoding/Medusa, assets/medusa_acc.csv)"
)


def check_contexts(engine: Engine, contexts: tuple[int, ...]) -> None:
    """Raise UserError for more cached positions than the model takes."""
    for length in contexts:
        if length >= engine.context:
            raise UserError(
                f"steps after {length} positions do not fit the context of {engine.name},"
                f" {engine.context}; --context takes fewer, and with --shape as many as you like"
            )


def measure_steps(engine: Engine, contexts: tuple[int, ...], tick: Tick) -> list[dict[str, Any]]:
    """Time vanilla steps and tree steps at each number of cached positions.

    Returns:
        For each context {"context", "vanilla_ms", "vanilla_tokens_per_second",
        "nodes": {n: {"ms", "overhead"}}, "tree"}. "tree" is the choice of `auto`, forecast from
        the heads' accuracies. If they are not calibrated, its "simulated" names the source.
    """
    check_contexts(engine, contexts)
    accuracy = (engine.trees.accuracy or PUBLISHED).pruned(engine.heads, engine.backbone.vocabulary)
    found = []
    for done, context in enumerate(contexts, 1):
        engine.forget()
        costs = {
            kind: measure(engine.runner, accuracy, kind, length=context, budget=inf)
            for kind in kinds(accuracy)
        }
        tree = _best_tree(accuracy, costs, engine.trees.policy.bookkeeping.of("tree"))
        tree["simulated"] = None if engine.trees.accuracy else SIMULATED
        found.append({"context": context, **_cost_figures(costs["static"]), "tree": tree})
        tick(done, len(contexts))
    return found


def _best_tree(accuracy: Accuracy, costs: dict[str, StepCost], beside: float) -> dict[str, Any]:
    """The choice of `auto`, which counts the time `beside` the forward; the figures do not."""
    best = fastest(options(accuracy, costs, beside=beside))
    cost = costs[best.kind]
    seconds = cost.seconds(best.nodes)
    return {
        "kind": best.kind,
        "nodes": best.nodes,
        "acceptance_length": round(best.length, 4),
        "overhead": round(seconds / cost.vanilla, 4),
        "speedup": round(best.length * cost.vanilla / seconds, 4),
        "tokens_per_second": round(best.length / seconds, 2),
    }


def _cost_figures(cost: StepCost) -> dict[str, Any]:
    nodes = {}
    for count, seconds in cost.by_nodes.items():
        overhead = round(seconds / cost.vanilla, 4)
        nodes[str(count)] = {"ms": round(1000 * seconds, 4), "overhead": overhead}
    return {
        "vanilla_ms": round(1000 * cost.vanilla, 4),
        "vanilla_tokens_per_second": round(1 / cost.vanilla, 2),
        "nodes": nodes,
    }


def bandwidth_of(engine: Engine, step: dict[str, Any], limit: dict[str, Any]) -> dict[str, Any]:
    """Bytes/s that a vanilla step and a step of the chosen tree read.

    Returns:
        {"vanilla": {"bytes", "gb_per_second", "share_of_limit"}, "tree": ...}
    """
    vanilla = step["vanilla_ms"] / 1000
    seconds = {"vanilla": vanilla, "tree": step["tree"]["overhead"] * vanilla}
    found = {}
    for kind, taken in seconds.items():
        size = step_bytes(engine.runner, step["context"], tree=kind == "tree")
        rate = size / taken / 1e9
        found[kind] = {
            "bytes": size,
            "gb_per_second": round(rate, 3),
            "share_of_limit": round(rate / limit["gb_per_second"], 4),
        }
    return found


def positions_needed(contexts: tuple[int, ...], histories: tuple[int, ...]) -> int:
    """Positions that a model needs so that these contexts and histories can be measured."""
    return max((*contexts, *histories), default=0) + 2 * MAX_NODES
