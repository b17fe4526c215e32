"""The machine under a model: its name, the memory that was taken, its last-level cache, library versions."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


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


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # bitsandbytes is not there on every platform
    return found


def peak_memory() -> dict[str, int]:
    """Bytes taken at most, so far or since `reset_peak_memory`: `host` by this process, `device` by a GPU's tensors."""
    peaks = {"host": _host_peak()}
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return {place: peak for place, peak in peaks.items() if peak}


def reset_peak_memory() -> None:
    """Let peaks begin at what is held now; on the host only where Linux lets a process do that."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _host_peak() -> int:
    """0 where nobody tells."""
    with suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource  # not there on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on the device now; where nobody tells, more than any machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return sys.maxsize


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache before memory; 0 where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
        return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=0)
    except (OSError, ValueError, KeyError):
        return 0
