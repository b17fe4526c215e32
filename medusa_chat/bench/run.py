"""All measurements of one model, section by section, and their result."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.bench.attention import attention_times
from medusa_chat.bench.bandwidth import backbone_bytes, heads_bytes, measure_limit
from medusa_chat.bench.figures import mode_figures, peer_figures, wall_ratio
from medusa_chat.bench.history import check_histories, measure_history
from medusa_chat.bench.host import host_gaps
from medusa_chat.bench.parts import step_parts
from medusa_chat.bench.replies import Round, baseline_name, fitting, measure_replies
from medusa_chat.bench.steps import bandwidth_of, check_contexts, measure_steps
from medusa_chat.bench.twin import compare_with_eager
from medusa_chat.config import UserError
from medusa_chat.decoding.graphs.static_step import StaticStep
from medusa_chat.machine.devices import device_name, peak_memory, versions

if TYPE_CHECKING:
    from medusa_chat.bench.job import BenchJob, ProgressBar
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.sampling import Sampling

PARTS_PROMPTS = 8  # prompts whose steps are timed part by part
PARTS_TOKENS = 32  # of their replies

Result = dict[str, Any]


def header(device: torch.device, command: str) -> Result:
    """The device, date, versions and command of a measurement."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def bench(engine: Engine, job: BenchJob, progress: ProgressBar) -> Result:
    """Measure a model's replies to the job's prompts, then its steps.

    Returns:
        The figures of every mode and peer, and those of `bench_steps`.
    """
    if not job.modes:
        raise UserError("bench needs at least one mode")
    _check(engine, job)
    tree = engine.trees.describe()  # timing the steps later may change the choice
    prompts = fitting(engine, job.prompts)
    ids = [engine.encode(prompt.opening()) for prompt in prompts[:PARTS_PROMPTS]]
    eager = _compare_captured(engine, ids)
    with progress("replies") as tick:
        rounds = measure_replies(engine, replace(job, prompts=prompts), tick)
    result = _about(engine) | {
        "prompts": len(prompts),
        "left_out": len(job.prompts) - len(prompts),
        "turns": job.turns,
        "rounds": job.rounds,
        "max_new_tokens": job.sampling.max_new_tokens,
        "temperature": job.sampling.temperature,
        "tree": tree,
    }
    return result | _reply_figures(rounds, job) | _machine(engine, job, ids, progress) | eager


def bench_steps(engine: Engine, job: BenchJob, progress: ProgressBar) -> Result:
    """Measure the steps of a model of random weights, whose replies mean nothing."""
    _check(engine, job)
    length = min(job.contexts, default=engine.context // 2)
    ids = [random.Random(0).choices(range(engine.backbone.vocabulary), k=length)]
    eager = _compare_captured(engine, ids)
    return _about(engine) | _machine(engine, job, ids, progress) | eager


def _check(engine: Engine, job: BenchJob) -> None:
    check_contexts(engine, job.contexts)
    check_histories(engine, job.histories)


def _reply_figures(rounds: list[Round], job: BenchJob) -> Result:
    result: Result = {"modes": {}, "peers": peer_figures(rounds, job) if job.peers else {}}
    for mode in job.modes:
        baseline = baseline_name(replace(job.sampling, mode=mode))
        result["modes"][mode] = mode_figures(rounds, mode, baseline)
    if job.view:
        share = wall_ratio(rounds, "view", job.modes[0])
        result["view"] = {"mode": job.modes[0], "share_of_tokens_per_second": share}
    return result


def _compare_captured(engine: Engine, prompts: list[list[int]]) -> Result:
    """Compare captured steps with eager ones; nothing where steps are not captured."""
    if not isinstance(engine.runner.fast, StaticStep):
        return {}
    return {"eager": compare_with_eager(engine, prompts)}


def _about(engine: Engine) -> Result:
    return {
        "device": device_name(engine.backbone.device, engine.backbone.threads),
        "model": engine.name,
        "dtype": str(engine.backbone.dtype).removeprefix("torch."),
        "heads": engine.heads,
        "backbone_bytes": backbone_bytes(engine.backbone),
        "heads_bytes": heads_bytes(engine.runner),
        "step": engine.backbone.step_name,
        "threads": engine.backbone.threads,
    }


def _machine(
    engine: Engine, job: BenchJob, prompts: list[list[int]], progress: ProgressBar
) -> Result:
    """Step costs, parts of a step, second turns, peak memory and the limit of the memory."""
    with progress("steps") as tick:
        steps = measure_steps(engine, job.contexts, tick) if engine.heads else []
    result = _parts(engine, job, prompts, progress)
    if job.histories:
        with progress("second turns") as tick:
            result["history"] = measure_history(engine, job.histories, job.rounds, tick)
    if times := attention_times(engine.backbone, job.contexts):
        result["attention"] = times
    result["peak_memory_bytes"] = peak_memory()  # before the limit takes its buffers
    with progress("memory") as tick:
        backbone = engine.backbone
        limit = measure_limit(backbone.device, backbone_bytes(backbone), backbone.threads)
        tick(1, 1)
    return result | {
        "limit": limit,
        "steps": [step | {"bandwidth": bandwidth_of(engine, step, limit)} for step in steps],
        "notices": list(engine.notices),
    }


def _parts(
    engine: Engine, job: BenchJob, prompts: list[list[int]], progress: ProgressBar
) -> Result:
    """Parts of a step and waits for the host, of every mode that has them."""
    parts: Result = {}
    host: Result = {}
    samplings = _short_samplings(engine, job)
    with progress("parts") as tick:
        for done, sampling in enumerate(samplings, 1):
            if found := step_parts(engine, prompts, sampling):
                parts[sampling.mode] = found
            if found := host_gaps(engine, prompts[0], sampling):
                host[sampling.mode] = found
            tick(done, len(samplings))
    return {"parts": parts, "host": host} if host else {"parts": parts}


def _short_samplings(engine: Engine, job: BenchJob) -> list[Sampling]:
    """Vanilla greedy decoding and the job's modes, each once, with short replies."""
    short = replace(job.sampling, max_new_tokens=PARTS_TOKENS)
    modes = [mode for mode in job.modes if mode != "vanilla"] if engine.heads else []
    vanilla = replace(short, mode="vanilla", temperature=0.0)
    return [vanilla, *(replace(short, mode=mode) for mode in modes)]
