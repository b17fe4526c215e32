"""KVCache: one preallocated buffer for all layers, whose rows can be kept, dropped and rewound."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


class KVCache(Cache):
    """Keys and values of one text.

    A forward writes its rows from `length` on; `commit` keeps some of them, `rewind` drops
    committed ones. Sliding-window layers get the full length too, because a buffer that slides
    could not be rewound: their mask limits what they see.

    Attributes:
        buffer: [2, layers, kv_heads, capacity, head_dim].
        length: committed positions.
        places: [n], where a forward writes its rows inside `at`; None elsewhere.
        span: positions that a forward reads inside `at`.
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
        # Zeros: a step over a fixed span also reads unwritten positions, which must be finite for
        # the mask to hide them.
        shape = (2, layers, kv_heads, capacity, head_dim)
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        self.places: Tensor | None = None
        self.span = capacity
        super().__init__(layers=[_Layer(self, layer) for layer in range(layers)])

    @property
    def capacity(self) -> int:
        """Positions that the buffer can hold."""
        return self.buffer.shape[3]

    def commit(self, rows: tuple[int, ...]) -> None:
        """Keep these rows of the last forward, in this order, as the text's next positions."""
        start = self.length
        stop = start + len(rows)
        if rows != tuple(range(len(rows))):
            kept = torch.tensor(rows, device=self.buffer.device) + start
            self.buffer[:, :, :, start:stop] = self.buffer.index_select(3, kept)
        self.length = stop

    def rewind(self, length: int) -> None:
        """Drop all but the first `length` positions; raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.length} positions to {length}")
        self.length = length

    def fill(self, length: int) -> None:
        """Commit zeros up to `length` positions, to time steps after a text of that length."""
        self.buffer[:, :, :, self.length : length] = 0
        self.length = length

    @contextmanager
    def at(self, places: Tensor, span: int) -> Iterator[None]:
        """Make forwards write their rows at `places` [n] and read `span` positions."""
        self.places = places
        self.span = span
        try:
            yield
        finally:
            self.places = None

    def rows_of(self, layer: int, rows: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return what a forward of n rows needs to write and read a layer by itself.

        Returns:
            The layer's keys and values, [1, kv_heads, capacity, head_dim] each, the places [n] of
            the new rows, and the end of the positions that are read.
        """
        own = self.layers[layer]
        assert isinstance(own, _Layer)
        if self.places is not None:
            return own.keys, own.values, self.places, self.span
        stop = self.length + rows
        return own.keys, own.values, torch.arange(self.length, stop, device=own.keys.device), stop

    def move(self, start: Tensor, rows: Tensor) -> None:
        """Move rows [m] of a forward at `start` [] to the positions from `start` on, in this order.

        The rows count from `start`. `commit` still has to count them as text.
        """
        places = start + torch.arange(len(rows), device=rows.device)
        self.buffer.index_copy_(3, places, self.buffer.index_select(3, start + rows))


class _Layer(CacheLayerMixin):
    """One layer's view of the shared buffer, as transformers' attention modules use it."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The cache holds its layers. A reference back would keep both until Python finds the cycle.
        self.cache: KVCache = weakref.proxy(cache)
        self.keys: Tensor = cache.buffer[0, layer].unsqueeze(0)
        self.values: Tensor = cache.buffer[1, layer].unsqueeze(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write n rows; returns the keys and values to read, [1, kv_heads, T, head_dim] each."""
        if key_states.shape[1::2] != self.keys.shape[1::2]:
            raise UserError(
                "this backbone's layers differ in the shapes of their keys and values, which one"
                " cache cannot hold"
            )
        if self.cache.places is not None:
            self.keys.index_copy_(2, self.cache.places, key_states)
            self.values.index_copy_(2, self.cache.places, value_states)
            stop = self.cache.span
        else:
            start = self.cache.length
            stop = start + key_states.shape[2]
            self.keys[:, :, start:stop] = key_states
            self.values[:, :, start:stop] = value_states
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffer exists from the start."""

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.capacity

    get_max_cache_shape = get_max_length  # the name up to transformers 5.12

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0
