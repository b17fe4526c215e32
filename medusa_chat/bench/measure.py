"""Measure a loaded model on its prompts, and models of random weights, as one result."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.random_engine import SHAPE_CONTEXTS, SHAPES_OF_GPU, random_engine
from medusa_chat.bench.run import bench, bench_steps, header
from medusa_chat.bench.steps import measure_steps, positions_needed
from medusa_chat.bench.twin import compare_in_float32
from medusa_chat.config import LoadOptions, UserError, out_of_memory
from medusa_chat.machine.devices import choose_device, reset_peak_memory
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from medusa_chat.bench.job import BenchJob, ProgressBar
    from medusa_chat.bench.random_engine import RandomModel
    from medusa_chat.decoding.engine import Engine

FLOAT32_PROMPTS = 4  # that the CPU answers too


@dataclass(frozen=True)
class Request:
    """Everything that one `medusa-chat bench` measures.

    Attributes:
        command: the command line, for the result.
        job: prompts and modes of the loaded model.
        load: loads the model; its keywords replace fields of LoadOptions.
        options: of models of random weights: device, dtype, engine, threads.
        named: the user named a model or prompts, so that the loaded model is measured.
        shapes: models of random weights.
        contexts: cached positions at which steps are timed, if the user gave any.
    """

    command: str
    job: BenchJob
    load: Callable[..., Engine]
    options: LoadOptions = LoadOptions()
    named: bool = False
    shapes: Sequence[RandomModel] = ()
    contexts: tuple[int, ...] | None = None


def measure(request: Request, progress: ProgressBar) -> dict[str, Any]:
    """Measure everything that a request names.

    A request that names nothing measures the bundled model, and on CUDA also `whole_story`.

    Returns:
        `header`, the figures of the loaded model that `bench` returns, `shapes`: {name:
        `bench_steps`}, the parts of `whole_story`, and `seconds`, the time of all this.
    """
    started = time.perf_counter()
    device = choose_device(request.options.device)
    if request.contexts:
        request = replace(request, job=replace(request.job, contexts=request.contexts))
    result = header(device, request.command) | {"model": "", "prompts": 0, "modes": {}, "peers": {}}
    if request.named or not request.shapes:
        result |= _loaded(request, progress)
    if request.shapes:
        result["shapes"] = {
            model.name: _shape(model, request, device, progress) for model in request.shapes
        }
    elif is_gpu(device) and not request.named:
        result |= whole_story(request, device, progress)
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def is_gpu(device: torch.device) -> bool:
    """True if steps are captured on such a device."""
    return device.type == "cuda"


def whole_story(request: Request, device: torch.device, progress: ProgressBar) -> dict[str, Any]:
    """Measure what documents a GPU besides the bundled model.

    Returns:
        `float32`: the bundled model in float32 against the CPU and against eager steps;
        `shapes`: the steps of SHAPES_OF_GPU, in nf4 also with the matrices apart;
        `left_out_shapes`: {name: reason} of those that the memory does not hold.
    """
    with progress("float32") as tick:
        openings = [prompt.opening() for prompt in request.job.prompts[:FLOAT32_PROMPTS]]
        float32 = compare_in_float32(request.load, openings)
        tick(1, 1)
    shapes = {}
    left_out = {}
    for model in SHAPES_OF_GPU:
        try:
            shapes[model.name] = _shape(model, request, device, progress)
            if model.quant == "nf4":
                shapes[model.name]["apart"] = _apart(model, request, device, progress)
        except (UserError, RuntimeError, MemoryError) as error:
            if not isinstance(error, UserError) and not out_of_memory(error):
                raise
            left_out[model.name] = reason_of(error)
    return {"float32": float32, "shapes": shapes, "left_out_shapes": left_out}


def _loaded(request: Request, progress: ProgressBar) -> dict[str, Any]:
    started = time.perf_counter()
    engine = request.load()
    seconds = round(time.perf_counter() - started, 3)
    return bench(engine, request.job, progress) | {"load_seconds": seconds}


def _shape(
    model: RandomModel, request: Request, device: torch.device, progress: ProgressBar
) -> dict[str, Any]:
    """Measure the steps of a random model."""
    started = time.perf_counter()
    engine, job = _random(model, request, device, progress)
    seconds = round(time.perf_counter() - started, 3)
    return bench_steps(engine, job, progress) | {
        "load_seconds": seconds,
        "quant": model.quant,
        "quant_heads": model.quant_heads,
        "own": model.own,
    }


def _apart(
    model: RandomModel, request: Request, device: torch.device, progress: ProgressBar
) -> list[dict[str, Any]]:
    """Measure step costs while matrices that read the same rows are not joined."""
    engine, job = _random(replace(model, fused=False), request, device, progress)
    with progress("matrices apart") as tick:
        return measure_steps(engine, job.contexts, tick)


def _random(
    model: RandomModel, request: Request, device: torch.device, progress: ProgressBar
) -> tuple[Engine, BenchJob]:
    """Make a random model, and the job with the contexts at which its steps are timed."""
    gc.collect()  # a cycle may still hold the model before this one
    reset_peak_memory()
    job = replace(request.job, contexts=request.contexts or SHAPE_CONTEXTS)
    with progress(model.name) as tick:
        positions = positions_needed(job.contexts, job.histories)
        engine = random_engine(model, positions, device, request.options)
        tick(1, 1)
    return engine, job
