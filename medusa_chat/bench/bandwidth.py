"""Bytes that a step reads, and the machine's limit for reading them."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa_chat.machine.devices import free_memory, last_level_cache
from medusa_chat.model.heads import HeadVocabulary, ParentBias
from medusa_chat.native.model import NativeHeads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from medusa_chat.decoding.runner import Runner
    from medusa_chat.model.backbone import Backbone

BUFFER = 2**30  # bytes of the buffer to read, if a quarter of the free memory allows it
READS = 8  # reads in a row, so that the start and the last wait weigh little
REPEATS = 3  # the fastest one is the limit
# Both read every byte once. Which of them only the memory limits depends on the device.
_READERS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.sum(),
    lambda x: x.view(torch.int32).amax(),
)


def read_limit(device: torch.device, size: int) -> float:
    """Bytes/s of reading a buffer of `size` bytes with the threads that decoding uses."""
    buffer = torch.ones(max(size // 4, 1), device=device)  # float32
    readers = _READERS * (REPEATS + 1)
    return buffer.nbytes / min(_seconds(reader, buffer) for reader in readers)


def _seconds(reader: Callable[[Tensor], Tensor], buffer: Tensor) -> float:
    """Mean seconds of READS reads in a row."""
    reader(buffer[:1]).item()
    started = time.perf_counter()
    for _ in range(READS):
        last = reader(buffer)
    last.item()  # waits for the device
    return (time.perf_counter() - started) / READS


def measure_limit(
    device: torch.device, model_bytes: int, threads: int | None = None
) -> dict[str, Any]:
    """Measure the speed of memory, and that of the last-level cache if the model fits into it.

    Args:
        device: whose memory.
        model_bytes: size of the model.
        threads: of a step on a CPU; None reads with those of torch.

    Returns:
        {"memory_gb_per_second", "buffer_bytes", "cache_bytes", "in_cache", "gb_per_second"}. The
        last is the limit for this model. "cached_gb_per_second" is added if it is the cache's.
    """
    with torch_threads(threads):
        return _limit(device, model_bytes)


def _limit(device: torch.device, model_bytes: int) -> dict[str, Any]:
    cache = last_level_cache(device)
    size = max(min(BUFFER, free_memory(str(device)) // 4), 4 * cache)
    memory = round(read_limit(device, size) / 1e9, 2)
    limit: dict[str, Any] = {
        "memory_gb_per_second": memory,
        "buffer_bytes": size,
        "cache_bytes": cache,
        "in_cache": model_bytes <= cache,
        "gb_per_second": memory,
    }
    if limit["in_cache"]:
        cached = round(read_limit(device, model_bytes) / 1e9, 2)
        limit |= {"cached_gb_per_second": cached, "gb_per_second": cached}
    return limit


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch compute with so many threads inside the block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resident_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all tensors of the modules. Bytes that tensors share count once.

    Quantized weights count in their stored form, with their scales.
    """
    tensors: dict[int, Tensor] = {}
    for module in modules:
        tensors |= {id(tensor): tensor for tensor in _tensors(module)}
    spans: set[tuple[int, int]] = set()
    total = 0
    for tensor in tensors.values():
        if tensor.layout == torch.strided:
            start = tensor.data_ptr()
            spans.add((start, start + tensor.nbytes))
        else:  # a tensor in oneDNN's own layout has no address
            total += tensor.numel() * tensor.element_size()
    return total + _covered(spans)


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Bytes in the union of spans (start, end)."""
    total = 0
    reached = 0
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of one module, without those of its children."""
    yield from _nested_tensors(module.parameters(recurse=False))
    yield from _nested_tensors(module.buffers(recurse=False))
    yield from _nested_tensors(vars(module).values())


def _nested_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among the values, and those in bitsandbytes' states: scales and code books."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif not type(value).__module__.startswith("bitsandbytes") or isinstance(value, nn.Module):
            continue
        yield from _nested_tensors(getattr(value, "__dict__", {}).values())


def backbone_bytes(backbone: Backbone) -> int:
    """Bytes of weights that a forward reads: all but the embedding, which is only looked up."""
    if backbone.native:
        return backbone.native.backbone_bytes
    embedding = backbone.model.get_input_embeddings()
    modules = [module for module in backbone.model.modules() if module is not embedding]
    if backbone.lm_head not in modules:
        modules.append(backbone.lm_head)
    return resident_bytes(modules)


def step_bytes(runner: Runner, length: int, *, tree: bool) -> int:
    """Bytes that one step reads after `length` cached positions.

    A tree step also reads the heads. Heads that share the LM head read it a second time.
    """
    cache = runner.cache.buffer
    total = backbone_bytes(runner.backbone) + cache.nbytes // cache.shape[3] * length
    heads = runner.heads
    if not tree or heads is None:
        return total
    return total + heads_bytes(runner)


def heads_bytes(runner: Runner) -> int:
    """Bytes of weights that the heads read, with the LM head that they share.

    Of a parent bias, and of the tables of a vocabulary, a step reads a few rows.
    """
    heads, native = runner.heads, runner.backbone.native
    if heads is None:
        return 0
    if isinstance(heads, NativeHeads):
        return native.heads_bytes(heads) if native else 0
    tables = (HeadVocabulary, ParentBias)
    total = resident_bytes(part for part in heads.modules() if not isinstance(part, tables))
    own = heads.lm_heads is not None and len(heads.lm_heads) > 0
    if not own and getattr(heads, "lm_head", None) is None:
        total += resident_bytes(runner.backbone.lm_head.modules())
    return total
