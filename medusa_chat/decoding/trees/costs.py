"""Measure what a step costs by its nodes, and keep the figures on disk for the next run."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import inf
from typing import TYPE_CHECKING, Any

from torch import nn

from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.trees.choice import StepCost
from medusa_chat.decoding.trees.growth import grow, kinds, tree_of
from medusa_chat.decoding.trees.tree import AnyTree, Tree
from medusa_chat.files import read_json, write_json
from medusa_chat.machine.devices import device_name, versions
from medusa_chat.native.model import NativeHeads
from medusa_chat.sampling import Sampling
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.decoding.runner import Runner
    from medusa_chat.decoding.trees.accuracy import Accuracy

Key = dict[str, Any]

# Node counts to time; the ones that a slow model needs most come first.
LADDER = (8, 16, 4, 32, 64, 2, 24, 12, 48, 6)
TIMED_LENGTH = 256  # cached positions of the steps that are timed
REPEATS = 12
BUDGET = 1.5  # seconds after which no further step is timed
ENOUGH = 2  # node counts that are timed whatever it takes
# Seconds: quicker steps are taken twice, and the second counts. In a reply a step follows one of as
# many nodes, and finds its buffers and code in the caches; after another number of nodes it may
# take a fourth more.
QUICK = 0.015
LEAST_TIMES = 4  # times that a count is timed before it may be dropped
MARGIN = 1.15  # a count is dropped if it stays slower than the best with its cost divided by this


def step_costs(
    runner: Runner, model: str, accuracy: Accuracy, copies: bool, folder: Path | None, *, anew: bool
) -> dict[str, StepCost]:
    """Step costs by the kind of tree, read from `folder` or measured and written to it.

    The runner's cache must be empty, and is empty afterwards.
    """
    copied = Copied((0,) * CHAIN, (-1.0,) * CHAIN, 1) if copies else None
    forecast = grow(accuracy, max(LADDER))[1][-1]
    key = cost_key(runner, model, forecast) | {"copies": copies}
    found = {}
    for kind in kinds(accuracy):
        timed = partial(measure, runner, accuracy, kind, copied=copied)
        found[kind] = cached(folder, key | {"kind": kind}, timed, anew=anew)
    return found


# ---- measuring ----


def measure(
    runner: Runner,
    accuracy: Accuracy,
    kind: str = "static",
    *,
    copied: Copied | None = None,
    length: int = TIMED_LENGTH,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCost:
    """Time steps over a blank text; the runner's cache must be empty, and is empty afterwards.

    Each round goes over the whole ladder, so that a slow moment of the machine does not fall on one
    count. Slow models get fewer rounds and counts, and a count that costs too much is dropped.

    Args:
        runner: takes the steps.
        accuracy: how often the heads are right.
        kind: of the trees.
        copied: copies that compete with the guesses; None without copies.
        length: cached positions of the steps that are timed, if the model has as many.
        budget: seconds; infinite for every count of the ladder, REPEATS times.
        clock: seconds, to measure by.
    """
    forecast = grow(accuracy, max(LADDER))[1]
    trees = _ladder(kind, accuracy, len(forecast))
    times = _Times(forecast, {nodes: [] for nodes in trees})
    length = timed_length(runner, length)
    rule = make_rule(Sampling())

    def step_seconds(nodes: int) -> float:
        runner.cache.rewind(length)
        before = clock()
        runner.step(0, trees[nodes], rule, copied if nodes > 1 else None)
        return clock() - before

    started = clock()
    try:
        runner.prefill([0], rule)
        runner.cache.fill(length)
        # The first vanilla step pays for more than itself, so a slow model takes two at once.
        times.add(1, step_seconds)
        for turn, nodes in product(range(REPEATS + 1), trees):
            if clock() - started > budget and times.enough(turn):
                break
            if budget == inf or times.may_win(nodes):
                times.add(nodes, step_seconds)
        return times.cost()
    finally:
        runner.cache.rewind(0)


def _ladder(kind: str, accuracy: Accuracy, most: int) -> dict[int, AnyTree]:
    """Trees to time by their nodes, in the order of the ladder; 1 node is a vanilla step."""
    trees: dict[int, AnyTree] = {1: Tree()}
    for wanted in LADDER:
        nodes = min(wanted, most)
        trees[nodes] = tree_of(kind, accuracy, nodes)
    return trees


def timed_length(runner: Runner, length: int = TIMED_LENGTH) -> int:
    """Cached positions of the steps that `measure` times."""
    return min(length, runner.backbone.context - 1, runner.cache.capacity - max(LADDER))


@dataclass(frozen=True)
class _Times:
    """The times so far.

    Attributes:
        forecast: forecast[n - 1]: acceptance length with n nodes.
        seconds: of each timed step, by nodes; 1 node is a vanilla step.
    """

    forecast: list[float]
    seconds: dict[int, list[float]]

    def add(self, nodes: int, step_seconds: Callable[[int], float]) -> None:
        """Time a step."""
        seconds = step_seconds(nodes)
        if seconds < QUICK:
            seconds = step_seconds(nodes)
        self.seconds[nodes].append(seconds)

    def enough(self, turn: int) -> bool:
        """Let the budget end the timing: after two rounds, or before with a slow model."""
        if 2 * len(self.seconds) * _typical(self.seconds[1]) < BUDGET:
            return turn > 1  # preparation took so long, such as the capture of CUDA graphs
        timed = sum(nodes > 1 and bool(seconds) for nodes, seconds in self.seconds.items())
        return timed >= min(ENOUGH, len(self.seconds) - 1)

    def may_win(self, nodes: int) -> bool:
        """Report that a count may be the fastest; it costs no less than any smaller one."""
        if nodes == 1:
            return True
        known = {
            count: _typical(seconds)
            for count, seconds in self.seconds.items()
            if count > 1 and len(seconds) >= LEAST_TIMES
        }
        least = max((seconds for count, seconds in known.items() if count <= nodes), default=0.0)
        rates = (self.forecast[count - 1] / seconds for count, seconds in known.items())
        return MARGIN * self.forecast[nodes - 1] >= max(rates, default=0.0) * least

    def cost(self) -> StepCost:
        """The typical cost of each count."""
        by_nodes = sorted(self.seconds.items())
        typical = {nodes: _typical(seconds) for nodes, seconds in by_nodes if seconds}
        vanilla = typical.pop(1)
        smooth = rising(list(typical.values()))
        return StepCost(vanilla, dict(zip(typical, smooth, strict=True)))


def _typical(seconds: list[float]) -> float:
    """The lower quartile: preparation and other programs only ever add to a step's time."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


def rising(values: list[float]) -> list[float]:
    """The rising sequence nearest to `values` (least squares, by pooling adjacent violators).

    A step of more nodes costs no less, and one lucky timing must not decide.
    """
    pools: list[tuple[float, int]] = []  # mean, members
    for value in values:
        mean = value
        members = 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean = (mean * members + other * more) / (members + more)
            members += more
        pools.append((mean, members))
    return [mean for mean, members in pools for _ in range(members)]


# ---- keeping ----


def cost_key(runner: Runner, model: str, forecast: float) -> Key:
    """List all that the cost of a step depends on.

    `forecast` is the acceptance length of the heads' largest tree: a count that was dropped because
    it could not win may do so with better heads.
    """
    return {
        "device": device_name(runner.backbone.device),
        "versions": versions() | {"medusa-chat": __version__},
        "model": model,
        "dtype": str(runner.backbone.dtype),
        "step": runner.backbone.step_name,
        "formats": _formats(runner),
        "backbone": _fingerprint(runner.backbone.model),
        "heads": _fingerprint(runner.heads),
        "positions": timed_length(runner),
        "forecast": round(forecast, 1),
    }


def _formats(runner: Runner) -> str | None:
    """Name the formats of weights that are packed for the native step."""
    packed, heads = runner.backbone.native, runner.heads
    if packed is None:
        return None
    return packed.formats(heads if isinstance(heads, NativeHeads) else None)


def _fingerprint(module: Any) -> str:
    """Hash a module's layers, and its weights' shapes, dtypes and quantization."""
    if not isinstance(module, nn.Module):
        return f"{type(module).__name__}"
    parts = []
    for name, layer in module.named_modules():
        # A packed layer shows no weight.
        sizes = [getattr(layer, size, None) for size in ("in_features", "out_features")]
        parts.append(f"{name} {type(layer).__name__} {sizes}")
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        state = getattr(weight, "quant_state", None)
        quantized = [getattr(state, field, None) for field in ("quant_type", "blocksize", "nested")]
        parts.append(f"{name} {tuple(weight.shape)} {weight.dtype} {quantized}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cached(
    folder: Path | None, key: Key, measure: Callable[[], StepCost], *, anew: bool = False
) -> StepCost:
    """Read the step costs of `key`; or measure and write them, if there are none or if `anew`.

    A file that is missing, damaged or not writable is no error: no cache may prevent a chat.
    """
    if folder is None:
        return measure()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = folder / f"{digest[:24]}.json"
    kept = None if anew else _read(file, key)
    if kept is not None:
        return kept
    cost = measure()
    document = {"key": key, "vanilla": cost.vanilla, "by_nodes": list(cost.by_nodes.items())}
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, document, indent=None)
    return cost


def _read(file: Path, key: Key) -> StepCost | None:
    """Read a file of `cached`; None if it is missing, damaged or of another key."""
    try:
        document = read_json(file)
        by_nodes = {int(nodes): float(seconds) for nodes, seconds in document["by_nodes"]}
        cost = StepCost(float(document["vanilla"]), by_nodes)
        times = (cost.vanilla, *by_nodes.values())
        sound = document["key"] == key and all(0 < seconds < inf for seconds in times)
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None
    return cost if sound and by_nodes and min(by_nodes) > 1 else None
