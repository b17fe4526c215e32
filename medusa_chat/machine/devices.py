"""The devices of this machine: names, memory, and that the CPU's is given back. No torch until one is asked."""

from __future__ import annotations

import ctypes
import platform
import shutil
import sys
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DTYPES = ("float32", "bfloat16", "float16")

_CGROUP = Path("/sys/fs/cgroup")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGE, _LARGEST = 1 << 20, 32 << 20  # bytes; the second is what glibc's own threshold rises to


def device_name(device: torch.device) -> str:
    """The device as a person would name it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "CPU"


def likely_device(device: str = "auto") -> str:
    """The device that will be chosen. Where no GPU can be, torch is not asked: importing it takes seconds."""
    signs = (Path("/dev/nvidia0"), Path("/dev/kfd"), Path("/dev/dxg"))
    possible = (
        sys.platform == "darwin"
        or shutil.which("nvidia-smi")
        or any(sign.exists() for sign in signs)
    )
    if device == "cpu" or (device == "auto" and not possible):
        return "cpu"
    return str(choose_device(device))


def choose_device(device: str) -> torch.device:
    """Return the device of that name; `auto` is the first of cuda, mps and cpu that is present.

    Raises:
        UserError: there is no such device.
    """
    import torch

    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if device == "auto":
        return torch.device(present[0])
    if device.split(":")[0] not in present:
        raise UserError(f"there is no {device} device here; --device auto picks one")
    try:
        return torch.device(device)
    except RuntimeError:
        raise UserError(f"{device!r} names no device; --device auto picks one") from None


def choose_dtype(device: torch.device, dtype: str | None = None) -> torch.dtype:
    """Return the number format of that name, or the one that suits a device if it is `auto`.

    That is bfloat16 if the hardware computes in it, else float32 on a CPU and float16 on a GPU.

    Raises:
        UserError: there is no such format.
    """
    import torch

    if dtype not in (None, "auto"):
        if dtype not in DTYPES:
            raise UserError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def free_memory(device: str) -> int:
    """Bytes that this process can have on a device: what it has already counts as free, being part of any plan.

    Args:
        device: cpu, mps, cuda or cuda:N.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return free + torch.cuda.memory_reserved(torch.device(device))
    available = (
        min(psutil.virtual_memory().available, _container_memory())
        + psutil.Process().memory_info().rss
    )
    if device == "mps":
        import torch

        return min(available, torch.mps.recommended_max_memory())
    return available


def total_memory(device: str) -> int:
    """Bytes of memory that a device has in all."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return psutil.virtual_memory().total


def _container_memory() -> int:
    """What the container that this process may be in (cgroup 2) still allows; files cached there give way."""
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(limit - used + int(stat.get("inactive_file", 0)), 0)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return psutil.virtual_memory().available


def peak_memory() -> dict[str, int]:
    """Bytes taken at most, so far or since `reset_peak_memory`: `host` by this process, `device` by a GPU's tensors."""
    import torch

    peaks = {"host": _host_peak()}
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return {place: peak for place, peak in peaks.items() if peak}


def reset_peak_memory() -> None:
    """Let peaks begin at what is held now; on the host only where Linux lets a process do that."""
    import torch

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


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache before memory; 0 where nobody tells."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
        return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=0)
    except (OSError, ValueError, KeyError):
        return 0


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # bitsandbytes is not there on every platform
    return found


@contextmanager
def frugal_heap() -> Iterator[None]:
    """While it lasts, what is freed in large pieces goes back to the system at once; glibc only.

    Otherwise small tensors that stay (the scales of quantized weights) come to lie between large ones that pass, and
    pin what those leave: measured as 0.2 bytes for each weight of a 7B model in nf4, a third of the model.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        # Decoding allocates and frees the same sizes over and over: there the heap is faster.
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)
        trim(0)
