"""The whole of `medusa-chat bench`: what is measured of a model, one section after the other, and its result."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.bench.bandwidth import backbone_bytes, measure_limit, resident_bytes
from medusa_chat.bench.figures import mode_figures, peer_figures, wall_ratio
from medusa_chat.bench.history import check_histories, measure_history
from medusa_chat.bench.host import host_gaps
from medusa_chat.bench.parts import step_parts
from medusa_chat.bench.replies import baseline_name, fitting, measure_replies
from medusa_chat.bench.steps import check_contexts, measure_steps, reached
from medusa_chat.bench.twin import compare_with_eager
from medusa_chat.config import Mode, Sampling, UserError
from medusa_chat.machine.devices import device_name, peak_memory, versions
from medusa_chat.model.attention.choice import FasterAttention

if TYPE_CHECKING:
    from medusa_chat.bench.plan import Plan, Progress
    from medusa_chat.decoding.engine import Engine

PARTS_PROMPTS = 8  # that are decoded once more to time the parts of their steps
PARTS_TOKENS = 32


def header(device: torch.device, command: str) -> dict[str, Any]:
    """Where, when, with what and by which command something was measured."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def bench(engine: Engine, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Measure a model on the plan's prompts, then its steps.

    Returns:
        what `medusa-chat bench` prints of one model: the figures of every mode and peer, and `measure_machine`'s.
    """
    if not plan.modes:
        raise UserError("bench needs at least one mode")
    check_contexts(engine, plan.contexts)
    check_histories(engine, plan.histories)
    tree = engine.trees.describe()  # before the timing of steps changes what auto knows
    prompts = fitting(engine, plan.prompts)
    ids = [engine.encode(prompt.opening()) for prompt in prompts[:PARTS_PROMPTS]]
    eager = _captured_check(engine, ids)
    with progress("replies") as tick:
        rounds = measure_replies(engine, replace(plan, prompts=prompts), tick)
    modes = {
        mode: mode_figures(rounds, mode, baseline_name(replace(plan.sampling, mode=mode)))
        for mode in plan.modes
    }
    result: dict[str, Any] = _about(engine) | {
        "prompts": len(prompts),
        "left_out": len(plan.prompts) - len(prompts),
        "turns": plan.turns,
        "rounds": plan.rounds,
        "max_new_tokens": plan.sampling.max_new_tokens,
        "temperature": plan.sampling.temperature,
        "tree": tree,
        "modes": modes,
        "peers": peer_figures(rounds, plan) if plan.peer else {},
    }
    if plan.view:
        first = plan.modes[0]
        result["view"] = {
            "mode": first,
            "share_of_tokens_per_second": wall_ratio(rounds, "view", first),
        }
    return result | _machine(engine, plan, ids, progress) | ({"eager": eager} if eager else {})


def bench_steps(engine: Engine, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Measure the steps of a model of random weights: whatever needs no text to be meaningful."""
    check_contexts(engine, plan.contexts)
    check_histories(engine, plan.histories)
    context = min(plan.contexts, default=engine.context // 2)
    ids = [random.Random(0).choices(range(engine.backbone.vocabulary), k=context)]
    eager = _captured_check(engine, ids)
    return (
        _about(engine) | _machine(engine, plan, ids, progress) | ({"eager": eager} if eager else {})
    )


def _captured_check(engine: Engine, prompts: list[list[int]]) -> dict[str, Any] | None:
    """The captured step against the eager one, where steps are captured."""
    return compare_with_eager(engine, prompts) if engine.runner.fast is not None else None


def _about(engine: Engine) -> dict[str, Any]:
    heads = engine.runner.heads
    return {
        "model": engine.name,
        "dtype": str(engine.backbone.dtype).removeprefix("torch."),
        "heads": engine.heads,
        "backbone_bytes": backbone_bytes(engine.backbone),
        "heads_bytes": 0 if heads is None else resident_bytes(heads.modules()),
    }


def _machine(
    engine: Engine, plan: Plan, prompts: list[list[int]], progress: Progress
) -> dict[str, Any]:
    """Cost of steps, the parts of a step, a second turn by its history, peak memory, the limit of the memory."""
    with progress("steps") as tick:
        steps = measure_steps(engine, plan.contexts, tick) if engine.heads else []
    with progress("parts") as tick:
        parts, host = {}, {}
        for done, sampling in enumerate(samplings := _sampled(engine, plan), 1):
            parts[sampling.mode] = step_parts(engine, prompts, sampling)
            host[sampling.mode] = host_gaps(engine, prompts[0], sampling)
            tick(done, len(samplings))
    result: dict[str, Any] = {"parts": {mode: found for mode, found in parts.items() if found}}
    if any(host.values()):
        result["host"] = {mode: found for mode, found in host.items() if found}
    if plan.histories:
        with progress("second turns") as tick:
            result["history"] = measure_history(engine, plan.histories, plan.rounds, tick)
    if isinstance(engine.backbone.attend, FasterAttention):
        result["attention"] = engine.backbone.attend.report()
    result["peak_memory_bytes"] = peak_memory()  # before the buffers that the limit takes
    with progress("memory") as tick:
        limit = measure_limit(engine.backbone.device, backbone_bytes(engine.backbone))
        tick(1, 1)
    return result | {
        "limit": limit,
        "steps": [step | {"bandwidth": reached(engine, step, limit)} for step in steps],
        "notices": list(engine.notices),
    }


def _sampled(engine: Engine, plan: Plan) -> list[Sampling]:
    """Vanilla and the plan's modes, each once, in short replies."""
    modes: list[Mode] = (
        ["vanilla", *(mode for mode in plan.modes if mode != "vanilla")]
        if engine.heads
        else ["vanilla"]
    )
    short = replace(plan.sampling, max_new_tokens=PARTS_TOKENS)
    return [replace(short, mode=mode) for mode in modes]
