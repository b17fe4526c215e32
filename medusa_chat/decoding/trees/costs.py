"""Step costs that were measured before, on disk: the same model on the same machine is timed once."""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.trees.accuracy import Accuracy, grow
from medusa_chat.decoding.trees.choice import LADDER, StepCost, kinds, measure, timed_length
from medusa_chat.files import write_text
from medusa_chat.machine.devices import device_name, versions
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.decoding.runner import Runner

Key = dict[str, Any]


def step_costs(
    runner: Runner, model: str, accuracy: Accuracy, copies: bool, folder: Path | None, *, anew: bool
) -> dict[str, StepCost]:
    """What steps cost by the kind of tree, kept in `folder`; dynamic trees only where their acceptance was measured.

    The runner's cache must be empty and is left so.
    """
    copied = Copied((0,) * CHAIN, (-1.0,) * CHAIN, 1) if copies else None
    forecast = grow(accuracy, max(LADDER))[1][-1]
    return {
        kind: cached(
            folder,
            cost_key(runner, model, forecast) | {"kind": kind, "copies": copies},
            partial(measure, runner, accuracy, tree_of=tree_of, copied=copied),
            anew=anew,
        )
        for kind, tree_of in kinds(accuracy).items()
    }


def cost_key(runner: Runner, model: str, forecast: float) -> Key:
    """All that the cost of a step depends on: device, threads, versions, weights' shapes and types, cached positions.

    `forecast` is the acceptance length of the heads' largest tree: what was not timed because it could not win may
    do so with better heads.
    """
    return {
        "device": device_name(runner.backbone.device),
        "versions": versions() | {"medusa-chat": __version__},
        "model": model,
        "dtype": str(runner.backbone.dtype),
        "backbone": _weights(runner.backbone.model),
        "heads": _weights(runner.heads),
        "positions": timed_length(runner),
        "forecast": round(forecast, 1),
    }


def _weights(module: Any) -> str:
    """A fingerprint of a module: its layers, and its weights' shapes, dtypes and quantization, not their values."""
    if not isinstance(module, nn.Module):
        return f"{type(module).__name__}"
    sizes = ("in_features", "out_features")  # a packed layer shows no weight
    parts = [
        f"{name} {type(m).__name__} {[getattr(m, s, None) for s in sizes]}"
        for name, m in module.named_modules()
    ]
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        state = getattr(weight, "quant_state", None)
        quantized = [getattr(state, field, None) for field in ("quant_type", "blocksize", "nested")]
        parts.append(f"{name} {tuple(weight.shape)} {weight.dtype} {quantized}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cached(
    folder: Path | None, key: Key, measure: Callable[[], StepCost], *, anew: bool = False
) -> StepCost:
    """The step costs kept under `key`, else, or `anew`, as measured now and kept.

    A file that is missing, damaged or can't be written is no error: a cache never stands in the way of a chat.
    """
    if folder is None:
        return measure()
    file = folder / (
        hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json"
    )
    kept = None if anew else _read(file, key)
    if kept is not None:
        return kept
    cost = measure()
    document = {"key": key, "vanilla": cost.vanilla, "by_nodes": list(cost.by_nodes.items())}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(document) + "\n")
    except OSError:
        pass
    return cost


def _read(file: Path, key: Key) -> StepCost | None:
    """What the file holds, or None if it is not there, damaged or of another key."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        by_nodes = {int(nodes): float(seconds) for nodes, seconds in document["by_nodes"]}
        cost = StepCost(float(document["vanilla"]), by_nodes)
        sound = document["key"] == key and all(
            0 < each < math.inf for each in (cost.vanilla, *by_nodes.values())
        )
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None
    return cost if sound and by_nodes and min(by_nodes) > 1 else None
