"""`medusa-chat bench` from its flags to its result: which models are measured, and how."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.job import SHIPPED_PROMPTS, BenchJob, Consume, ProgressBar
from medusa_chat.bench.random_engine import (
    SHAPE_CONTEXTS,
    SHAPES_OF_GPU,
    RandomModel,
    parse_shapes,
    random_engine,
)
from medusa_chat.bench.run import bench, bench_steps, header
from medusa_chat.bench.steps import measure_steps, positions_needed
from medusa_chat.bench.twin import compare_in_float32
from medusa_chat.config import Sampling, UserError, out_of_memory
from medusa_chat.machine.devices import reset_peak_memory
from medusa_chat.model.linear.quantization import as_quant
from medusa_chat.model.loading import choose_device, choose_dtype
from medusa_chat.prompts import read_prompts

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    import torch

    from medusa_chat.decoding.engine import Engine

FLOAT32_PROMPTS = 4  # that the CPU answers too


def measure(
    options: Namespace,
    sampling: Sampling,
    load: Callable[..., Engine],
    progress: ProgressBar,
    view: Consume | None = None,
) -> dict[str, Any]:
    """Measure the model that the flags name on its prompts, and the random ones.

    Without a word of either it is the bundled model, and on CUDA the whole story of the GPU: the bundled model in
    float32 against the CPU and against eager steps too, and the shapes that our speeds are told of, as far as they fit,
    those in nf4 with their matrices apart as well.

    Args:
        load: gives the model; what it is given takes the place of flags.

    Returns:
        the result: `header`, the figures of the model as `bench` gives them, `shapes`: {name: `bench_steps`}, what
        `whole_story` tells, and the seconds that all of it took.
    """
    started = time.perf_counter()
    device = choose_device(options.device)
    named = any((options.model, options.heads, options.prompts))
    if options.shape and not named and (options.peer or options.view):
        raise UserError(
            "--peer and --view compare replies, which random weights have not: name --model or --prompts"
        )
    plan, shapes = _plan(options, sampling, view), _shapes(options)
    result = header(device, options.words) | {"model": "", "prompts": 0, "modes": {}, "peers": {}}
    if named or not options.shape:
        result |= _loaded(load, plan, progress)
    if is_gpu(device) and not named and not options.shape:
        result |= whole_story(options, plan, load, device, progress)
    elif shapes:
        result["shapes"] = {
            each.name: _shape(each, options, plan, device, progress) for each in shapes
        }
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def is_gpu(device: torch.device) -> bool:
    """Whether steps are captured on such a device."""
    return device.type == "cuda"


def whole_story(
    options: Namespace,
    plan: BenchJob,
    load: Callable[..., Engine],
    device: torch.device,
    progress: ProgressBar,
) -> dict[str, Any]:
    """What is told of a GPU besides the bundled model's figures there: `float32`, `shapes` and `left_out_shapes`.

    A shape that the memory does not hold is left out: {its name: why}.
    """
    with progress("float32") as tick:
        opening = [prompt.opening() for prompt in plan.prompts[:FLOAT32_PROMPTS]]
        told: dict[str, Any] = {
            "float32": compare_in_float32(load, opening),
            "shapes": {},
            "left_out_shapes": {},
        }
        tick(1, 1)
    for each in SHAPES_OF_GPU:
        try:
            told["shapes"][each.name] = _shape(each, options, plan, device, progress)
            if each.quant == "nf4":
                told["shapes"][each.name]["apart"] = _apart(each, options, plan, device, progress)
        except (UserError, RuntimeError, MemoryError) as error:
            if not isinstance(error, UserError) and not out_of_memory(error):
                raise
            told["left_out_shapes"][each.name] = str(error).splitlines()[0]
    return told


def _plan(options: Namespace, sampling: Sampling, view: Consume | None) -> BenchJob:
    modes = [sampling.with_value("mode", name).mode for name in options.modes.split(",")]
    plan = BenchJob(
        read_prompts(options.prompts or [SHIPPED_PROMPTS], options.limit),
        modes,
        sampling,
        options.rounds,
        options.turns,
        options.peer is not None,
        view,
        histories=options.history,
    )
    return replace(plan, contexts=options.context) if options.context else plan


def _shapes(options: Namespace) -> list[RandomModel]:
    if not options.shape:
        return []
    quant, quant_heads = as_quant(options.quant), as_quant(options.quant_heads)
    return parse_shapes(
        options.shape,
        quant,
        quant_heads=quant_heads,
        heads=options.shape_heads,
        own=options.own_lm_heads,
    )


def _loaded(load: Callable[[], Engine], plan: BenchJob, progress: ProgressBar) -> dict[str, Any]:
    started = time.perf_counter()
    engine = load()
    seconds = round(time.perf_counter() - started, 3)
    return bench(engine, plan, progress) | {"load_seconds": seconds}


def _shape(
    wanted: RandomModel,
    options: Namespace,
    plan: BenchJob,
    device: torch.device,
    progress: ProgressBar,
) -> dict[str, Any]:
    """The steps of a random model."""
    started = time.perf_counter()
    engine, plan = _random(wanted, options, plan, device, progress)
    seconds = round(time.perf_counter() - started, 3)
    return bench_steps(engine, plan, progress) | {
        "load_seconds": seconds,
        "quant": wanted.quant,
        "quant_heads": wanted.quant_heads,
        "own": wanted.own,
    }


def _apart(
    wanted: RandomModel,
    options: Namespace,
    plan: BenchJob,
    device: torch.device,
    progress: ProgressBar,
) -> list[dict[str, Any]]:
    """The cost of steps where matrices that read the same rows are not joined."""
    engine, plan = _random(replace(wanted, fused=False), options, plan, device, progress)
    with progress("matrices apart") as tick:
        return measure_steps(engine, plan.contexts, tick)


def _random(
    wanted: RandomModel,
    options: Namespace,
    plan: BenchJob,
    device: torch.device,
    progress: ProgressBar,
) -> tuple[Engine, BenchJob]:
    """A random model, and the plan with the contexts that its steps are timed behind."""
    gc.collect()  # a model before this one may still be held by a cycle
    reset_peak_memory()
    plan = replace(plan, contexts=options.context or SHAPE_CONTEXTS)
    with progress(wanted.name) as tick:
        dtype = choose_dtype(device, options.dtype)
        engine = random_engine(
            wanted, positions_needed(plan.contexts, plan.histories), device, dtype
        )
        tick(1, 1)
    return engine, plan
