"""`medusa-chat bench`: what the heads bring on this machine. Ratios within one run, medians, equal baselines."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median
from typing import Any

import torch

from medusa_chat.config import Mode, Sampling, UserError
from medusa_chat.decoding.engine import Engine
from medusa_chat.events import Stats, Step
from medusa_chat.peers import TransformersPeer
from medusa_chat.prompts import Prompt

Consume = Callable[[Iterable[Step]], object]


@dataclass(frozen=True)
class Run:
    """One reply: its figures, and the seconds from the prompt to its end as its consumer saw them."""

    stats: Stats
    wall: float
    prefill: float


@dataclass(frozen=True)
class Plan:
    """What is measured. `view` is a consumer of steps that is timed beside the plain one."""

    prompts: list[Prompt]
    modes: list[Mode]
    sampling: Sampling
    rounds: int = 3
    peer: bool = False
    view: Consume | None = None


def bench(engine: Engine, plan: Plan, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measure every way of decoding on every prompt, one after the other, round by round.

    Returns:
        the result as `medusa-chat bench` prints it.
    """
    if not plan.modes:
        raise UserError("bench needs at least one mode")
    ways = _ways(engine, plan)
    rounds: list[dict[str, list[Run]]] = []
    for prompt in plan.prompts[:2]:  # warm-up: first calls allocate and choose kernels
        for way in ways.values():
            way(prompt)
    for number in range(plan.rounds):
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for done, prompt in enumerate(plan.prompts, 1):
            for name, way in ways.items():
                runs[name].append(way(prompt))
            progress(number * len(plan.prompts) + done, plan.rounds * len(plan.prompts))
        rounds.append(runs)
    return _result(engine, plan, rounds)


def _ways(engine: Engine, plan: Plan) -> dict[str, Callable[[Prompt], Run]]:
    """The ways of decoding by name. Each sampling mode has a vanilla baseline that samples alike."""

    def ours(sampling: Sampling, consume: Consume = list) -> Callable[[Prompt], Run]:
        return lambda prompt: _run(engine, prompt, sampling, consume)

    ways: dict[str, Callable[[Prompt], Run]] = {}
    for mode in plan.modes:
        sampling = replace(plan.sampling, mode=mode)
        baseline = replace(sampling, mode="vanilla", sample=not sampling.greedy)
        ways.setdefault(_baseline_name(sampling), ours(baseline))
        ways[mode] = ours(sampling)
    if plan.view:
        ways["view"] = ours(replace(plan.sampling, mode=plan.modes[0]), plan.view)
    if plan.peer:
        peer = TransformersPeer(engine)
        ways["transformers"] = lambda prompt: _peer_run(engine, peer, prompt, plan.sampling.max_new_tokens)
    return ways


def _baseline_name(sampling: Sampling) -> str:
    return "vanilla" if sampling.greedy else "vanilla-sampled"


def _run(engine: Engine, prompt: Prompt, sampling: Sampling, consume: Consume) -> Run:
    """One reply to the prompt's first turn, prefilled anew."""
    engine.forget()
    stats = Stats()

    def counted() -> Iterable[Step]:
        for step in engine.generate(prompt.opening(), sampling):
            stats.add(step)
            yield step

    started = time.perf_counter()
    consume(counted())
    return Run(stats, time.perf_counter() - started, engine.prefill_seconds)


def _peer_run(engine: Engine, peer: TransformersPeer, prompt: Prompt, max_new_tokens: int) -> Run:
    ids = engine.encode(prompt.opening())
    started = time.perf_counter()
    reply = peer.generate(ids, max_new_tokens)
    seconds = time.perf_counter() - started
    return Run(Stats(new_tokens=len(reply), seconds=seconds), seconds, 0.0)


def _result(engine: Engine, plan: Plan, rounds: list[dict[str, list[Run]]]) -> dict[str, Any]:
    modes = {}
    for mode in plan.modes:
        baseline = _baseline_name(replace(plan.sampling, mode=mode))
        modes[mode] = _figures(rounds, mode, baseline)
    result: dict[str, Any] = {
        "device": device_name(engine.backbone.device),
        "model": engine.name,
        "dtype": str(engine.backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "prompts": len(plan.prompts),
        "rounds": plan.rounds,
        "max_new_tokens": plan.sampling.max_new_tokens,
        "temperature": plan.sampling.temperature,
        "tree": engine.describe_tree(),
        "modes": modes,
        "peers": {},
    }
    first = plan.modes[0]
    if plan.peer:
        result["peers"]["transformers"] = {
            "tokens_per_second": _median_rate(rounds, "transformers"),
            "ratio": {mode: _ratio(rounds, mode, "transformers") for mode in plan.modes},
            "vanilla_ratio": _ratio(rounds, _baseline_name(replace(plan.sampling, mode=first)), "transformers"),
        }
    if plan.view:
        result["view"] = {"mode": first, "share_of_tokens_per_second": _ratio(rounds, "view", first)}
    return result


def _figures(rounds: list[dict[str, list[Run]]], mode: str, baseline: str) -> dict[str, Any]:
    """One mode's figures: each is computed for every round, and the median round is told."""
    per_round = []
    for runs in rounds:
        tree, vanilla = _pooled(runs[mode]), _pooled(runs[baseline])
        per_round.append(
            {
                "acceptance_length": tree["tree_tokens"] / max(tree["tree_steps"], 1),
                "overhead": tree["step"] / vanilla["step"],
                "speedup": (tree["tokens"] / tree["seconds"]) / (vanilla["tokens"] / vanilla["seconds"]),
                "tokens_per_second": tree["tokens"] / tree["seconds"],
                "vanilla_tokens_per_second": vanilla["tokens"] / vanilla["seconds"],
                "wall_tokens_per_second": tree["tokens"] / tree["wall"],
                "step_ms": 1000 * tree["step"],
                "vanilla_step_ms": 1000 * vanilla["step"],
                "time_to_first_token_ms": 1000 * tree["first"],
            }
        )
    figures = {key: median(row[key] for row in per_round) for key in per_round[0]}
    heads: dict[str, Any] = {}
    whole = [run.stats for runs in rounds for run in runs[mode]]
    for head in sorted({head for stats in whole for head in stats.reached}):
        heads[str(head)] = sum(s.accepted[head] for s in whole) / sum(s.reached[head] for s in whole)
    return {key: round(value, 4) for key, value in figures.items()} | {
        "head_acceptance": {head: round(rate, 4) for head, rate in heads.items()},
        "new_tokens": sum(stats.new_tokens for stats in whole),
    }


def _pooled(runs: list[Run]) -> dict[str, float]:
    """Sums over replies; `step` is the median over replies of a reply's median step."""
    steps = [s for run in runs if (s := run.stats.tree_step_seconds or run.stats.vanilla_step_seconds)]
    return {
        "tokens": sum(run.stats.new_tokens for run in runs),
        "seconds": sum(run.stats.seconds for run in runs),
        "wall": sum(run.wall for run in runs),
        "tree_tokens": sum(run.stats.tree_tokens for run in runs),
        "tree_steps": sum(run.stats.tree_steps for run in runs),
        "step": median(steps) if steps else float("nan"),
        "first": median(run.prefill for run in runs),
    }


def _rate(runs: list[Run]) -> float:
    return sum(run.stats.new_tokens for run in runs) / sum(run.wall for run in runs)


def _median_rate(rounds: list[dict[str, list[Run]]], way: str) -> float:
    return round(median(_rate(runs[way]) for runs in rounds), 2)


def _ratio(rounds: list[dict[str, list[Run]]], way: str, other: str) -> float:
    """Tokens/s of one way over another's, prefill included on both sides."""
    return round(median(_rate(runs[way]) / _rate(runs[other]) for runs in rounds), 4)


def device_name(device: torch.device) -> str:
    """The device as a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
