"""What a step costs by its nodes, the tree that follows, and how near a step is to the limit of the memory."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.bandwidth import step_bytes
from medusa_chat.config import MAX_NODES, UserError
from medusa_chat.decoding.trees.accuracy import PUBLISHED
from medusa_chat.decoding.trees.choice import StepCost, fastest, options
from medusa_chat.decoding.trees.costs import measure
from medusa_chat.decoding.trees.growth import kinds

if TYPE_CHECKING:
    from medusa_chat.bench.plan import Tick
    from medusa_chat.decoding.engine import Engine

SIMULATED = "published accuracies of the Vicuna-7B Medusa-1 heads (FasterDecoding/Medusa, assets/medusa_acc.csv)"


def check_contexts(engine: Engine, contexts: tuple[int, ...]) -> None:
    """Raise UserError for more cached positions than the model takes."""
    for length in contexts:
        if length >= engine.context:
            raise UserError(
                f"steps behind {length} positions do not fit the context of {engine.name}, {engine.context};"
                " --context takes fewer, and with --shape as many as you like"
            )


def measure_steps(engine: Engine, contexts: tuple[int, ...], tick: Tick) -> list[dict[str, Any]]:
    """Time vanilla steps and tree steps over the ladder of costs.measure behind each number of cached positions.

    Returns:
        for each context {"context", "vanilla_ms", "vanilla_tokens_per_second", "nodes": {n: {"ms", "overhead"}},
        "tree"}; `tree` is what `auto` picks, and "simulated" says whose accuracies its acceptance length comes from
        where the model's own were never measured.
    """
    check_contexts(engine, contexts)
    measured = engine.trees.accuracy
    accuracy = (PUBLISHED if measured is None else measured).pruned(
        engine.heads, engine.backbone.vocabulary
    )
    found = []
    for done, context in enumerate(contexts, 1):
        engine.forget()
        costs = {
            kind: measure(engine.runner, accuracy, kind, length=context, budget=inf)
            for kind in kinds(accuracy)
        }
        best = fastest(options(accuracy, costs))
        vanilla = costs[best.kind].vanilla
        picked: dict[str, Any] = {
            "kind": best.kind,
            "nodes": best.nodes,
            "acceptance_length": round(best.length, 4),
            "overhead": round(best.seconds / vanilla, 4),
            "speedup": round(best.rate * vanilla, 4),
            "tokens_per_second": round(best.rate, 2),
            "simulated": SIMULATED if measured is None else None,
        }
        found.append(_told(context, costs["static"]) | {"tree": picked})
        tick(done, len(contexts))
    return found


def _told(context: int, cost: StepCost) -> dict[str, Any]:
    return {
        "context": context,
        "vanilla_ms": round(1000 * cost.vanilla, 4),
        "vanilla_tokens_per_second": round(1 / cost.vanilla, 2),
        "nodes": {
            str(nodes): {
                "ms": round(1000 * seconds, 4),
                "overhead": round(seconds / cost.vanilla, 4),
            }
            for nodes, seconds in cost.by_nodes.items()
        },
    }


def reached(engine: Engine, step: dict[str, Any], limit: dict[str, Any]) -> dict[str, Any]:
    """Bytes that a vanilla step and a step of the picked tree must read, the GB/s that this is, and its share of the
    limit: {"vanilla": {"bytes", "gb_per_second", "share_of_limit"}, "tree": ...}.
    """
    told = {}
    vanilla = step["vanilla_ms"] / 1000
    for kind, seconds in (("vanilla", vanilla), ("tree", step["tree"]["overhead"] * vanilla)):
        size = step_bytes(engine.runner, step["context"], tree=kind == "tree")
        rate = size / seconds / 1e9
        share = rate / limit["gb_per_second"]
        told[kind] = {
            "bytes": size,
            "gb_per_second": round(rate, 3),
            "share_of_limit": round(share, 4),
        }
    return told


def room_for(contexts: tuple[int, ...], histories: tuple[int, ...]) -> int:
    """Positions that a model needs to be measured behind these contexts and histories."""
    return max((*contexts, *histories), default=0) + 2 * MAX_NODES
