"""How far a step is from the time that reading its weights takes: the measured limit, and the bytes of a step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa_chat.machine.devices import free_memory, last_level_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from medusa_chat.decoding.runner import Runner
    from medusa_chat.model.backbone import Backbone

BUFFER = 2**30  # bytes of the buffer that is read, where memory allows
READS = 8  # in a row, so that starting them and waiting for the last one count little
REPEATS = 3  # the fastest of which is the limit
# Reductions that read every byte once; which one is limited by the memory alone differs by device.
_READERS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.sum(),
    lambda x: x.view(torch.int32).amax(),
)


def read_limit(device: torch.device, size: int) -> float:
    """Bytes/s at which a buffer of `size` bytes is read, with as many threads as decoding has."""
    buffer = torch.ones(max(size // 4, 1), device=device)  # float32
    return max(
        buffer.nbytes / _seconds(reader, buffer) for reader in _READERS for _ in range(REPEATS + 1)
    )


def _seconds(reader: Callable[[Tensor], Tensor], buffer: Tensor) -> float:
    """Time of one read of a row of them. The copy of the last result to the host waits for the device."""
    reader(buffer[:1]).item()
    started = time.perf_counter()
    for _ in range(READS):
        last = reader(buffer)
    last.item()
    return (time.perf_counter() - started) / READS


def measure_limit(device: torch.device, model_bytes: int) -> dict[str, Any]:
    """The limit of memory, and for a model that fits into the last-level cache the limit of that as well.

    Returns:
        {"memory_gb_per_second", "buffer_bytes", "cache_bytes", "in_cache", "gb_per_second"}; the last is the limit
        that holds for the model, with "cached_gb_per_second" besides where it is the cache's.
    """
    cache = last_level_cache(device)
    size = max(min(BUFFER, free_memory(str(device)) // 4), 4 * cache)
    memory = read_limit(device, size) / 1e9
    limit: dict[str, Any] = {
        "memory_gb_per_second": round(memory, 2),
        "buffer_bytes": size,
        "cache_bytes": cache,
        "in_cache": model_bytes <= cache,
        "gb_per_second": round(memory, 2),
    }
    if limit["in_cache"]:
        cached = read_limit(device, model_bytes) / 1e9
        limit |= {"cached_gb_per_second": round(cached, 2), "gb_per_second": round(cached, 2)}
    return limit


def resident_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all tensors that the modules hold, each byte once however many tensors share it.

    Quantized weights count as they lie in memory, with their scales; packed ones too.
    """
    spans: set[tuple[int, int]] = set()
    opaque: dict[int, int] = {}
    for tensor in {
        id(tensor): tensor for module in modules for tensor in _tensors(module)
    }.values():
        if tensor.layout == torch.strided:
            spans.add((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
        else:  # oneDNN's own layout tells no address
            opaque[id(tensor)] = tensor.numel() * tensor.element_size()
    total, reached = sum(opaque.values()), 0
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of one module, without those of its children."""
    held = [
        *module.parameters(recurse=False),
        *module.buffers(recurse=False),
        *vars(module).values(),
    ]
    for value in held:
        yield from _held(value)


def _held(value: Any) -> Iterator[Tensor]:
    """A tensor, and what bitsandbytes keeps beside it: scales, code books, their own scales."""
    if isinstance(value, Tensor):
        yield value
    elif not type(value).__module__.startswith("bitsandbytes") or isinstance(value, nn.Module):
        return
    for inner in getattr(value, "__dict__", {}).values():
        yield from _held(inner)


def backbone_bytes(backbone: Backbone) -> int:
    """Bytes of weights that a forward reads: all but the embedding, of which a few rows are looked up."""
    embedding, lm_head = backbone.model.get_input_embeddings(), backbone.lm_head
    modules = [module for module in backbone.model.modules() if module is not embedding]
    return resident_bytes(modules if lm_head in modules else [*modules, lm_head])


def step_bytes(runner: Runner, length: int, *, tree: bool) -> int:
    """Bytes that one step behind `length` cached positions has to read.

    A tree step reads the heads too, and the backbone's LM head once more where they share it.
    """
    cache = runner.cache.buffer
    total = backbone_bytes(runner.backbone) + cache.nbytes // cache.shape[3] * length
    heads = runner.heads
    if tree and heads is not None:
        total += resident_bytes(heads.modules())
        own = heads.lm_heads is not None and len(heads.lm_heads) > 0
        if not own and getattr(heads, "lm_head", None) is None:
            total += resident_bytes(runner.backbone.lm_head.modules())
    return total
