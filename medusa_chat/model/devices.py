"""The memory of devices: what is free, and that the CPU's is given back. No torch until a GPU is asked for."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGE, _LARGEST = 1 << 20, 32 << 20  # bytes; the second is what glibc's own threshold rises to


def likely_device(device: str = "auto") -> str:
    """The device that will be chosen. Where no GPU can be, torch is not asked: importing it takes seconds."""
    signs = (Path("/dev/nvidia0"), Path("/dev/kfd"), Path("/dev/dxg"))
    possible = sys.platform == "darwin" or shutil.which("nvidia-smi") or any(sign.exists() for sign in signs)
    if device == "cpu" or (device == "auto" and not possible):
        return "cpu"
    from medusa_chat.model.loading import choose_device

    return str(choose_device(device))


def free_memory(device: str) -> int:
    """Bytes that this process can have on a device: what it has already counts as free, being part of any plan.

    Args:
        device: cpu, mps, cuda or cuda:N.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return free + torch.cuda.memory_reserved(torch.device(device))
    available = min(psutil.virtual_memory().available, _container_memory()) + psutil.Process().memory_info().rss
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
