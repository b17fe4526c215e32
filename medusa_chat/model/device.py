"""The machine under a model: its name, and library versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def device_name(device: torch.device) -> str:
    """The device as a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "CPU"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # bitsandbytes is not there on every platform
    return found
