"""Measure a loaded model on its prompts, and models of random weights, as one result."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.random_engine import SHAPE_CONTEXTS, SHAPES_OF_GPU, random_engine
from medusa_chat.bench.run import bench, bench_steps, header
from medusa_chat.bench.steps import measure_steps, positions_needed
from medusa_chat.bench.twin import compare_in_float32
from medusa_chat.config import LoadOptions, UserError, out_of_memory
from medusa_chat.machine.devices import choose_device, reset_peak_memory
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from medusa_chat.bench.job import BenchJob, ProgressBar
    from medusa_chat.bench.random_engine import RandomModel
    from medusa_chat.decoding.engine import Engine

FLOAT32_PROMPTS = 4  # that the CPU answers too
REPLIES = "replies"  # parts of a bench; a shape is one by its name
FLOAT32 = "float32"

Result = dict[str, Any]
Keep = Callable[[Result], object]
Part = Callable[["Request", "torch.device", "ProgressBar"], Result]


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
        parts: names of `parts_of`; empty for all.
    """

    command: str
    job: BenchJob
    load: Callable[..., Engine]
    options: LoadOptions = LoadOptions()
    named: bool = False
    shapes: Sequence[RandomModel] = ()
    contexts: tuple[int, ...] | None = None
    parts: tuple[str, ...] = ()


def ignore(_result: Result) -> None:
    """Keep nothing."""


def measure(request: Request, progress: ProgressBar, keep: Keep = ignore) -> Result:
    """Measure everything that a request names, part by part.

    A request that names nothing measures the bundled model; on CUDA also what documents a GPU: the
    bundled model in float32 against the CPU and against eager steps, and SHAPES_OF_GPU.

    Args:
        request: models and prompts.
        progress: opens a bar for each part.
        keep: gets the result so far after each part, to write it.

    Returns:
        `header`, the figures of the loaded model that `bench` returns, `shapes`: {name:
        `bench_steps`}, `left_out_shapes`: {name: reason} of those that the memory does not hold,
        `float32`: `compare_in_float32`, and `seconds`, the time of all this.

    Raises:
        UserError: the request names a part that it does not have, or a measurement fails.
    """
    started = time.perf_counter()
    device = choose_device(request.options.device)
    if request.contexts:
        request = replace(request, job=replace(request.job, contexts=request.contexts))
    result = header(device, request.command) | {"model": "", "prompts": 0, "modes": {}, "peers": {}}
    for part in _chosen(request, parts_of(request, device)):
        for key, value in part(request, device, progress).items():
            joined = isinstance(value, dict) and key in ("shapes", "left_out_shapes")
            result[key] = result.get(key, {}) | value if joined else value
        result["seconds"] = round(time.perf_counter() - started, 1)
        keep(result)
    return result


def is_gpu(device: torch.device) -> bool:
    """True if steps are captured on such a device."""
    return device.type == "cuda"


def parts_of(request: Request, device: torch.device) -> dict[str, Part]:
    """Name the parts of a request in their order; each fits into ten minutes on a GPU."""
    parts: dict[str, Part] = {}
    if request.named or not request.shapes:
        parts[REPLIES] = _loaded
    if request.shapes:
        parts |= {model.name: partial(_shape, model) for model in request.shapes}
    elif is_gpu(device) and not request.named:
        parts[FLOAT32] = _float32
        parts |= {model.name: partial(_documented_shape, model) for model in SHAPES_OF_GPU}
    return parts


def _chosen(request: Request, parts: dict[str, Part]) -> list[Part]:
    for name in request.parts:
        if name not in parts:
            raise UserError(f"--part {name}: the parts of this bench are {', '.join(parts)}")
    return [part for name, part in parts.items() if not request.parts or name in request.parts]


def _float32(request: Request, _device: torch.device, progress: ProgressBar) -> Result:
    with progress(FLOAT32) as tick:
        openings = [prompt.opening() for prompt in request.job.prompts[:FLOAT32_PROMPTS]]
        found = compare_in_float32(request.load, openings)
        tick(1, 1)
    return {"float32": found}


def _documented_shape(
    model: RandomModel, request: Request, device: torch.device, progress: ProgressBar
) -> Result:
    """Measure a random model, in nf4 also with its matrices apart, if the memory holds it."""
    try:
        found = _shape(model, request, device, progress)
        if model.quant == "nf4":
            apart = _apart(model, request, device, progress)
            found["shapes"][model.name]["apart"] = apart
    except (UserError, RuntimeError, MemoryError) as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            raise
        return {"left_out_shapes": {model.name: reason_of(error)}}
    return found


def _loaded(request: Request, _device: torch.device, progress: ProgressBar) -> Result:
    started = time.perf_counter()
    engine = request.load()
    seconds = round(time.perf_counter() - started, 3)
    return bench(engine, request.job, progress) | {"load_seconds": seconds}


def _shape(
    model: RandomModel, request: Request, device: torch.device, progress: ProgressBar
) -> Result:
    """Measure the steps of a random model."""
    started = time.perf_counter()
    engine, job = _random(model, request, device, progress)
    seconds = round(time.perf_counter() - started, 3)
    found = bench_steps(engine, job, progress) | {
        "load_seconds": seconds,
        "quant": model.quant,
        "quant_heads": model.quant_heads,
        "own": model.own,
    }
    return {"shapes": {model.name: found}}


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
