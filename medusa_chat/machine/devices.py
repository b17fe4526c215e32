"""The devices of this machine: names, number formats, memory, and the heap. No torch on import."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import warnings
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
CGROUP = Path("/sys/fs/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")
CACHES = PROCESSORS / "cpu0" / "cache"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
M_MMAP_THRESHOLD = -3
LARGE = 1 << 20  # bytes
LARGEST = 32 << 20  # the most that glibc raises its own threshold to


def device_name(device: torch.device, threads: int | None = None) -> str:
    """Return a device's name for people to read, a CPU's with the threads of torch or others."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor_name()}, {threads or torch.get_num_threads()} threads"


def processor_name() -> str:
    """Return the system's name of the processor."""
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "CPU"


def likely_device(device: str = "auto") -> str:
    """Return the name of the device that `choose_device` will choose.

    Importing torch takes seconds, so this does without it if the machine has no GPU.
    """
    signs = (Path("/dev/nvidia0"), Path("/dev/kfd"), Path("/dev/dxg"))
    possible = sys.platform == "darwin" or any(sign.exists() for sign in signs)
    possible = possible or shutil.which("nvidia-smi") is not None
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


def maps_memory() -> bool:
    """Tell if torch's allocator can join memory that is free in pieces on a GPU, as on Linux.

    A setting of the user's own may keep it from doing so.
    """
    own = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return "expandable_segments:True" in own if own else sys.platform == "linux"


def prepare_allocator(device: torch.device) -> None:
    """Let torch's allocator map memory anew, before weights are loaded to a GPU."""
    import torch

    own = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if device.type != "cuda" or own or not maps_memory():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 has another name for it, 2.11 has this one
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def free_memory(device: str) -> int:
    """Return the bytes that this process can have on a device, with those that it has already.

    Args:
        device: cpu, mps, cuda or cuda:N.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return free + torch.cuda.memory_reserved(torch.device(device))
    available = min(psutil.virtual_memory().available, container_memory())
    available += psutil.Process().memory_info().rss
    if device == "mps":
        import torch

        return min(available, torch.mps.recommended_max_memory())
    return available


def total_memory(device: str) -> int:
    """Return the bytes of a device's memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return psutil.virtual_memory().total


def usable_cores() -> int:
    """Count the physical cores that this process may use: its affinity, and its container's quota.

    Two processors of one core count once: they share the units that a step keeps busy.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_core_of(processor) for processor in os.sched_getaffinity(0)})
    else:
        cores = psutil.cpu_count(logical=False) or 1
    return max(min(cores, _processor_quota()), 1)


def _core_of(processor: int) -> tuple[str, str]:
    """Return the package and the core of a processor; itself where the system does not say."""
    topology = PROCESSORS / f"cpu{processor}" / "topology"
    try:
        package = (topology / "physical_package_id").read_text()
        return package, (topology / "core_id").read_text()
    except OSError:
        return "", str(processor)


def _processor_quota() -> int:
    """Return the processors that the container (cgroup 2 or 1) allows, whole ones at least 1."""
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return sys.maxsize if quota == "max" else max(int(quota) // int(period), 1)
    with suppress(OSError, ValueError):
        quota_us = int((CGROUP / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((CGROUP / "cpu" / "cpu.cfs_period_us").read_text())
        return max(quota_us // period_us, 1) if quota_us > 0 else sys.maxsize
    return sys.maxsize


def container_memory() -> int:
    """Return the bytes that this process's container (cgroup 2) still allows.

    Cached files count as free. Without a container, or without a limit, it is all that is free.
    """
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" if there is no limit
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(limit - used + int(stat.get("inactive_file", 0)), 0)
    except (OSError, ValueError):
        return psutil.virtual_memory().available


def peak_memory() -> dict[str, int]:
    """Return the most bytes in use so far, or since `reset_peak_memory`.

    Returns:
        `host` for this process, and `device` for the tensors on a GPU; unknown ones are left out.
    """
    import torch

    peaks = {"host": _host_peak()}
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return {place: peak for place, peak in peaks.items() if peak}


def reset_peak_memory() -> None:
    """Start peaks at what is in use now; the host's only on Linux, which allows that."""
    import torch

    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _host_peak() -> int:
    """Return the peak in bytes, or 0 if the platform does not report it."""
    with suppress(OSError), open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def last_level_cache(device: torch.device) -> int:
    """Return the bytes of the largest cache, or 0 if the platform does not report it."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
        return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes), default=0)
    except (OSError, ValueError, KeyError):
        return 0


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a measurement depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "bitsandbytes"):
        with suppress(PackageNotFoundError):  # not every platform has bitsandbytes
            found[name] = version(name)
    return found


@contextmanager
def frugal_heap() -> Iterator[None]:
    """Return large freed blocks to the system at once while this lasts; glibc only.

    Small tensors that stay, such as the scales of quantized weights, otherwise come to lie between
    large ones that pass, and pin the memory that those leave: measured as 0.2 bytes for each weight
    of a 7B model in nf4, a third of the model.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
        trim = libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        # Decoding allocates and frees the same sizes again and again: the heap is faster there.
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
        trim(0)
