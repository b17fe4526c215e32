"""`medusa-chat doctor`: what is installed, what this machine has, what will be used and why. A check that fails tells.

torch is imported by the checks themselves, so that one that cannot be imported is a finding too.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.hub.model_list import packaged_file, read_models, resolve_model, user_file
from medusa_chat.machine.devices import free_memory, total_memory
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from medusa_chat.config import ModelSpec

REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "huggingface-hub",
    "safetensors",
    "tokenizers",
)
OPTIONAL = {
    "peft": "for train --recipe medusa2 and distilled",
    "matplotlib": "for calibrate --plot",
    "fschat": "for templates of models whose tokenizer has none",
    "triton": "for faster attention on an NVIDIA GPU, where it comes with PyTorch",
}
TOLERANCE = 0.02  # of a 4-bit product, relative to the one with the weights made 16-bit first


@dataclass(frozen=True)
class Finding:
    """One line of what was found. fault: whether medusa-chat cannot work as it should because of it."""

    topic: str
    name: str
    text: str
    fault: bool = False


def examine() -> list[Finding]:
    """Everything that is worth knowing when something does not work, topic by topic."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # what it warns of on import is found here too
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "devices": _devices,
        "4 bit": _quantization,
        "hub": _hub,
        "models": _models,
        "default": _default,
    }
    return [finding for topic, check in checks.items() for finding in _told(topic, check)]


def _told(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that breaks off says why in a line of its own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from check()
    except Exception as error:  # whatever a broken installation raises
        yield Finding(topic, "failed", _reason(error), fault=True)


def _reason(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _versions() -> Iterator[Finding]:
    from medusa_chat.version import __version__

    yield Finding("versions", "medusa-chat", __version__)
    yield Finding("versions", "Python", f"{platform.python_version()} on {platform.platform()}")
    for package in REQUIRED:
        found = _version(package)
        yield Finding(
            "versions",
            package,
            found or f"not installed: pip install {package}",
            fault=found is None,
        )
    for package, purpose in OPTIONAL.items():
        yield Finding("versions", package, _version(package) or f"not installed ({purpose})")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _names() -> list[str]:
    """The devices that torch can compute on here."""
    import torch

    names = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return [*names, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _devices() -> Iterator[Finding]:
    import torch

    for name in _names():
        memory = f"{size_text(free_memory(name))} of {size_text(total_memory(name))} free"
        yield Finding("devices", name, f"{_describe(name)}; {memory}")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        text = (
            f"there is an NVIDIA driver, but torch {torch.__version__}, built {built}, sees no GPU"
        )
        yield Finding("devices", "cuda", text, fault=True)


def _describe(name: str) -> str:
    import torch

    from medusa_chat.machine.devices import processor_name

    if name == "cpu":
        bfloat16 = (
            "computes in bfloat16"
            if torch.ops.mkldnn._is_mkldnn_bf16_supported()
            else "no bfloat16"
        )
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
        return (
            f"{processor_name()}, {threads}, {torch.backends.cpu.get_cpu_capability()}, {bfloat16}"
        )
    if name == "mps":
        return "Apple GPU, sharing the memory of the CPU"
    found = torch.cuda.get_device_properties(name)
    return (
        f"{found.name}, compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}"
    )


def _quantization() -> Iterator[Finding]:
    """A tiny 4-bit product on each device, compared with the one of the same weights in 16 bits."""
    import torch

    from medusa_chat.model.loading import choose_dtype

    for name in _names():
        dtype = choose_dtype(torch.device(name), None)
        try:
            error, packed = _product(name, dtype)
        except Exception as reason:  # whatever bitsandbytes runs into
            yield Finding(
                "4 bit",
                name,
                f"an nf4 product fails: {_reason(reason)}; --quant none works",
                fault=True,
            )
            continue
        kernel = _kernel(name, packed)
        text = f"an nf4 product in {_short(dtype)} runs, {kernel}; off by {error:.1%}"
        yield Finding("4 bit", name, text, fault=error > TOLERANCE)


def _product(device: str, dtype: torch.dtype) -> tuple[float, bool]:
    """The largest relative error of an nf4 product, and whether the CPU's packed weights were used."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit

    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(n, 128, generator=generator) for n in (64, 4))
    layer: Any = bitsandbytes.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.to(dtype), requires_grad=False, quant_type="nf4"
    )
    layer, rows = layer.to(device).eval(), rows.to(device, dtype)
    with torch.inference_mode():
        expected = (
            rows.float() @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
        )
        error = (layer(rows).float() - expected).abs().max() / expected.abs().max()
    return float(error), bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def _kernel(device: str, packed: bool) -> str:
    if device != "cpu":
        return "with bitsandbytes' own kernels"
    return "on weights packed for AVX-512" if packed else "by unpacking the weights, which is slow"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = f"{size_text(shutil.disk_usage(existing).free)} free"
    yield Finding(
        "hub", "cache", f"{cache}{'' if existing == cache else ' (not there yet)'}; {free}"
    )
    offline = (
        "offline: HF_HUB_OFFLINE is set, nothing is downloaded"
        if constants.HF_HUB_OFFLINE
        else "online"
    )
    yield Finding("hub", "mode", f"{offline}; {constants.ENDPOINT}")


def _models() -> Iterator[Finding]:
    shipped = read_models(packaged_file())
    yield Finding("models", "shipped", f"{len(shipped)} in {packaged_file()}")
    own = user_file()
    text = f"{len(read_models(own))} in {own}" if own.is_file() else f"none: there is no {own}"
    yield Finding("models", "your own", text)


def _default() -> Iterator[Finding]:
    """What a command without flags uses, by the same functions that choose then."""
    from medusa_chat.model.loading import choose_device, choose_dtype

    device = choose_device("auto")
    dtype = choose_dtype(device, None)
    first = "the first of cuda, mps and cpu that is here"
    yield Finding("default", "device", f"{device}: {first} (--device)")
    yield Finding("default", "numbers", f"{_short(dtype)}: {_why(device, dtype)} (--dtype)")
    spec: ModelSpec = resolve_model(None)
    quant = "16 bit" if spec.quant == "auto" else spec.quant
    yield Finding(
        "default",
        "model",
        f"{spec.name}, {quant}; large ones of `medusa-chat models` nf4 (--quant)",
    )


def _why(device: torch.device, dtype: torch.dtype) -> str:
    import torch

    if dtype == torch.bfloat16:
        return f"this {device.type} computes in it"
    return f"this {device.type} does not compute in bfloat16"
