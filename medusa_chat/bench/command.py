"""`medusa-chat bench` from its flags to its result: which models are measured, and how."""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medusa_chat.bench.plan import Consume, Plan, Progress, RandomModel
from medusa_chat.bench.run import bench, bench_steps, header
from medusa_chat.bench.shapes import SHAPE_CONTEXTS, SHAPES_OF_GPU, fits, parse_shapes, random_engine
from medusa_chat.bench.steps import room_for
from medusa_chat.config import Sampling, UserError
from medusa_chat.decoding.engine import Engine
from medusa_chat.model.devices import reset_peak_memory
from medusa_chat.model.loading import choose_device, choose_dtype
from medusa_chat.model.quantization import as_quant
from medusa_chat.prompts import read_prompts

OWN_PROMPTS = Path(__file__).parent / "prompts.jsonl"


def measure(
    options: Namespace, sampling: Sampling, load: Callable[[], Engine], progress: Progress, view: Consume | None = None
) -> dict[str, Any]:
    """Measure the model that the flags name on its prompts, and the random ones.

    Without a word of either it is the bundled model; on CUDA the shapes that our speeds are told of are measured too,
    as far as they fit.

    Returns:
        the result: `header`, the figures of the model as `bench` gives them, and `shapes`: {name: `bench_steps`}.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(device, options.dtype)
    named = any((options.model, options.heads, options.prompts))
    if options.shape and not named and (options.peer or options.view):
        raise UserError("--peer and --view compare replies, which random weights have not: name --model or --prompts")
    plan, shapes = _plan(options, sampling, view), _shapes(options)
    if device.type == "cuda" and not named and not options.shape:
        shapes = [each for each in SHAPES_OF_GPU if fits(each, room_for(SHAPE_CONTEXTS, plan.histories), device, dtype)]
    result = header(device, options.words) | {"model": "", "prompts": 0, "modes": {}, "peers": {}}
    if named or not options.shape:
        result |= _loaded(load, plan, progress)
    measured = {each.name: _shape(each, options, plan, device, dtype, progress) for each in shapes}
    return result | ({"shapes": measured} if measured else {})


def _plan(options: Namespace, sampling: Sampling, view: Consume | None) -> Plan:
    modes = [sampling.with_value("mode", name).mode for name in options.modes.split(",")]
    plan = Plan(
        read_prompts(options.prompts or [OWN_PROMPTS], options.limit), modes, sampling, options.rounds, options.turns,
        options.peer is not None, view, histories=options.history,
    )  # fmt: skip
    return replace(plan, contexts=options.context) if options.context else plan


def _shapes(options: Namespace) -> list[RandomModel]:
    if not options.shape:
        return []
    quant, quant_heads = as_quant(options.quant), as_quant(options.quant_heads)
    return parse_shapes(
        options.shape, quant, quant_heads=quant_heads, heads=options.shape_heads, own=options.own_lm_heads
    )


def _loaded(load: Callable[[], Engine], plan: Plan, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    engine = load()
    seconds = round(time.perf_counter() - started, 3)
    return bench(engine, plan, progress) | {"load_seconds": seconds}


def _shape(
    wanted: RandomModel, options: Namespace, plan: Plan, device: torch.device, dtype: torch.dtype, progress: Progress
) -> dict[str, Any]:
    gc.collect()  # a model before this one may still be held by a cycle
    reset_peak_memory()
    plan = replace(plan, contexts=options.context or SHAPE_CONTEXTS)
    started = time.perf_counter()
    with progress(wanted.name) as tick:
        engine = random_engine(wanted, room_for(plan.contexts, plan.histories), device, dtype)
        tick(1, 1)
    seconds = round(time.perf_counter() - started, 3)
    return bench_steps(engine, plan, progress) | {
        "load_seconds": seconds, "quant": wanted.quant, "quant_heads": wanted.quant_heads, "own": wanted.own,
    }  # fmt: skip
