"""KVCache: one preallocated buffer for all layers, with rows that can be kept, dropped and rewound."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


class KVCache(Cache):
    """Keys and values of one text, [2, layers, kv_heads, capacity, head_dim].

    A forward writes its rows behind `length`; `commit` keeps some of them, `rewind` drops committed ones.
    Sliding-window layers get the full length too: their mask does the sliding, so that they can be rewound.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros: a step that reads a fixed span masks what is not text yet, which must be finite for that.
        self.buffer = torch.zeros(
            2, layers, kv_heads, capacity, head_dim, dtype=dtype, device=device
        )
        self.length = 0
        self.places: Tensor | None = (
            None  # [n], where a forward writes its rows if not behind `length`
        )
        self.span = capacity
        super().__init__(layers=[_Layer(self, layer) for layer in range(layers)])

    @property
    def capacity(self) -> int:
        return self.buffer.shape[3]

    def commit(self, rows: tuple[int, ...]) -> None:
        """Keep these rows of the last forward, in this order, as the text's next positions."""
        start, stop = self.length, self.length + len(rows)
        if rows != tuple(range(len(rows))):
            kept = torch.tensor(rows, device=self.buffer.device) + start
            self.buffer[:, :, :, start:stop] = self.buffer.index_select(3, kept)
        self.length = stop

    def fill(self, length: int) -> None:
        """Commit zeros up to `length` positions: enough to time a step behind a text that nobody reads."""
        self.buffer[:, :, :, self.length : length] = 0
        self.length = length

    @contextmanager
    def at(self, places: Tensor, span: int) -> Iterator[None]:
        """Inside, a forward writes its rows at `places` [n], a tensor of the device, and reads `span` positions."""
        self.places, self.span = places, span
        try:
            yield
        finally:
            self.places = None

    def move(self, start: Tensor, rows: Tensor) -> None:
        """Put these rows [m] behind `start` [], in this order, from `start` on; `commit` has to count them still."""
        places = start + torch.arange(len(rows), device=rows.device)
        self.buffer.index_copy_(3, places, self.buffer.index_select(3, start + rows))

    def rewind(self, length: int) -> None:
        """Drop what lies behind the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.length} positions to {length}")
        self.length = length


class _Layer(CacheLayerMixin):
    """One layer's view of the shared buffer, as transformers' attention modules use it."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        super().__init__()
        self.cache = cache
        self.keys: Tensor
        self.values: Tensor
        self.keys, self.values = (
            cache.buffer[0, layer].unsqueeze(0),
            cache.buffer[1, layer].unsqueeze(0),
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write n rows behind the committed length; returns keys and values [1, kv_heads, length + n, head_dim]."""
        if key_states.shape[1::2] != self.keys.shape[1::2]:
            raise UserError(
                "this backbone's layers differ in their key and value shapes, which one cache can't hold"
            )
        if self.cache.places is not None:
            self.keys.index_copy_(2, self.cache.places, key_states)
            self.values.index_copy_(2, self.cache.places, value_states)
            return self.keys[:, :, : self.cache.span], self.values[:, :, : self.cache.span]
        stop = self.cache.length + key_states.shape[2]
        self.keys[:, :, self.cache.length : stop] = key_states
        self.values[:, :, self.cache.length : stop] = value_states
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffer is there from the start."""

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0
