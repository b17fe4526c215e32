"""NativeStep: runs the heads, rows of the backbone and greedy acceptance in one native call."""

from __future__ import annotations

import os
from ctypes import addressof, byref, c_int32
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from medusa_chat.native.library import UnavailableError, load
from medusa_chat.native.structures import (
    BFLOAT16,
    FLOAT32,
    MOST_GUESSES,
    MOST_ROWS,
    CacheOf,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.native.model import NativeHeads, NativeModel
    from medusa_chat.native.rows import ChosenRows, FixedRows
    from medusa_chat.native.takes import Cache


class Team:
    """Threads that run steps one after another; engines may share them."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: by default one for each processor that the process may use."""
        self.threads = threads or len(os.sched_getaffinity(0))
        self._free = load().mc_team_free
        self.handle = load().mc_team_new(self.threads)
        if not self.handle:
            raise UnavailableError(f"{self.threads} threads cannot be started")

    def close(self) -> None:
        """End the threads; no step may run any more."""
        handle, self.handle = self.handle, None
        if handle:
            self._free(handle)

    def __del__(self) -> None:
        if hasattr(self, "_free"):
            self.close()


@dataclass(frozen=True)
class Settled:
    """What a step tells.

    Attributes:
        tokens: of each row.
        guesses: of all heads, flattened [heads * ranked].
        accepted: row of the deepest row that greedy decoding keeps; next: the token behind it.
            Both -1 where acceptance is left to the caller.
        heads_seconds, rows_seconds: time of the parts.
    """

    tokens: list[int]
    guesses: list[int]
    accepted: int
    next: int
    heads_seconds: float
    rows_seconds: float


class NativeStep:
    """Runs steps over one cache. Not for two threads at once.

    Attributes:
        last: float32 [1, hidden], the last committed row's hidden state, which the heads read.
            Greedy steps and `prefill` set it; otherwise the caller does.
        hidden: float32 [256, hidden]; the first n are those of the last step's rows.
    """

    def __init__(
        self, model: NativeModel, heads: NativeHeads | None, team: Team, cache: Cache
    ) -> None:
        self.model, self.heads, self.team, self.cache = model, heads, team, cache
        library, shape = load(), model.structure
        own = None if heads is None else byref(heads.structure)
        capacity = cache.capacity
        self._free, self._run = library.mc_engine_free, library.mc_engine_step
        self._keep = library.mc_cache_keep
        self._engine = library.mc_engine_new(byref(shape), own, team.handle, capacity)
        if not self._engine:
            raise UnavailableError("the native step has no memory, or does not take such sizes")
        self.vocabulary = shape.vocabulary
        self.last = torch.zeros(1, shape.hidden)
        self.hidden = torch.zeros(MOST_ROWS, shape.hidden)
        self._logits: Tensor | None = None
        count = heads.heads if heads else 0
        ints = c_int32 * MOST_ROWS
        self._tokens, self._parents = ints(), ints()
        self._row_tokens, self._argmax = ints(), ints()
        self._guesses = (c_int32 * (count * MOST_GUESSES))()
        self._log_p = np.zeros(count * MOST_GUESSES, np.float32)
        self._log_p_address = self._log_p.ctypes.data
        self._step = Step()
        self._step.last, self._step.hidden = self.last.data_ptr(), self.hidden.data_ptr()
        self._step.guesses = addressof(self._guesses)
        self._step.row_tokens = addressof(self._row_tokens)
        self._cache = self._cache_of(cache)

    def close(self) -> None:
        """Give the memory back."""
        engine, self._engine = self._engine, None
        if engine:
            self._free(engine)

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self.close()

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the text, in blocks; returns the last one's logits, float32 [1, V]."""
        for start in range(0, len(tokens), MOST_ROWS):
            block = tokens[start : start + MOST_ROWS]
            ends = start + len(block) == len(tokens)
            self.rows(block, None, logits_from=len(block) - 1 if ends else len(block))
            self.cache.commit(tuple(range(len(block))))
        self.last.copy_(self.hidden[len(block) - 1])
        return self.logits(1)

    def rows(
        self, tokens: Sequence[int], parents: Sequence[int] | None = None, logits_from: int = 0
    ) -> Settled:
        """Run n rows behind the text.

        Args:
            tokens: [n].
            parents: [n], or None if each row follows the one before.
            logits_from: the first row whose logits are wanted, see `logits`; n for none.
        """
        step, count = self._step, len(tokens)
        self._tokens[:count] = list(tokens)
        step.tokens, step.table, step.ranked = addressof(self._tokens), None, 0
        step.parents = None
        if parents is not None:
            self._parents[:count] = list(parents)
            step.parents = addressof(self._parents)
        self._want_logits(count, logits_from)
        return self._settle(count, 0, False)

    def fixed(self, root: int, tree: FixedRows, greedy: bool) -> Settled:
        """Run a fixed tree's heads and rows; accept greedily or leave the logits of all rows."""
        step = self._step
        step.tokens, step.table, step.root = None, addressof(tree.places), root
        step.parents, step.ranked = addressof(tree.parents), tree.ranked
        step.log_p = None
        self._want_logits(tree.size, 0, wanted=not greedy)
        return self._settle(tree.size, tree.ranked, greedy)

    def choose(self, root: int, rows: ChosenRows, greedy: bool) -> Settled:
        """Run a tree's heads, choose its rows, and run those; `rows` tells which they are.

        Accepts greedily or leaves the logits of all rows.
        """
        step = self._step
        step.tokens, step.table, step.root = None, None, root
        step.ranked, step.choice = rows.ranked, addressof(rows.choice)
        biased = self.heads is not None and self.heads.parent_bias is not None
        reads = not rows.measured or biased or rows.choice.coupling
        step.log_p = self._log_p_address if reads else None
        try:
            self._want_logits(rows.size, 0, wanted=not greedy)
            return self._settle(rows.size, rows.ranked, greedy)
        finally:
            step.choice = None

    def chosen(self, tokens: Sequence[int], parents: Sequence[int], greedy: bool) -> Settled:
        """Run rows that were chosen from `guess`; accept greedily or leave the logits of all."""
        step, count = self._step, len(tokens)
        self._tokens[:count] = list(tokens)
        self._parents[:count] = list(parents)
        step.tokens, step.table, step.ranked = addressof(self._tokens), None, 0
        step.parents = addressof(self._parents)
        self._want_logits(count, 0, wanted=not greedy)
        return self._settle(count, 0, greedy)

    def texts(
        self, tokens: Sequence[int], firsts: Sequence[int], places: Sequence[int], logits_from: int
    ) -> None:
        """Run rows of many texts, each written to its own text's slots. The cache's text is none.

        Args:
            tokens: [n].
            firsts: [n], the first slot of the text that each row belongs to.
            places: [n], the position of each row in its text. Those before it are there, from
                earlier steps or in this one.
            logits_from: the first row whose logits are wanted, see `logits`; n for none.
        """
        step, count = self._step, len(tokens)
        self._tokens[:count] = list(tokens)
        own_firsts, own_places = (c_int32 * count)(*firsts), (c_int32 * count)(*places)
        step.tokens, step.table, step.parents = addressof(self._tokens), None, None
        step.texts, step.places = addressof(own_firsts), addressof(own_places)
        try:
            self._want_logits(count, logits_from)
            self._settle(count, 0, False)
        finally:
            step.texts, step.places = None, None

    def guess(self, ranked: int) -> tuple[list[int], Tensor]:
        """The heads' likeliest tokens [heads * ranked], and their log p [heads, ranked]."""
        step = self._step
        step.rows, step.ranked, step.accept = 0, ranked, 0
        step.log_p = self._log_p_address
        self._call()
        count = len(self._guesses) // MOST_GUESSES * ranked
        return self._guesses[:count], torch.from_numpy(self.log_p(ranked))

    def log_p(self, ranked: int) -> np.ndarray:
        """The heads' log p of the last step's guesses: [heads, ranked], a view."""
        count = len(self._guesses) // MOST_GUESSES * ranked
        return self._log_p[:count].reshape(-1, ranked)

    def logits(self, count: int) -> Tensor:
        """Those of the last step's rows from `logits_from` on: float32 [count, V], a view."""
        assert self._logits is not None
        return self._logits[:count]

    def keep(self, rows: Sequence[int]) -> None:
        """Move the rows of the accepted path behind the text and commit them."""
        if any(row != place for place, row in enumerate(rows)):
            shape = self.model.structure
            moved = (c_int32 * len(rows))(*rows)
            sizes = shape.layers, shape.kv_heads, shape.head_dim, self.cache.length
            self._keep(byref(self._cache), *sizes, moved, len(rows))
        self.cache.commit(tuple(range(len(rows))))

    def _want_logits(self, rows: int, first: int, *, wanted: bool = True) -> None:
        """Let rows from `first` on meet the LM head, and keep their logits if they are wanted."""
        step, count = self._step, rows - first
        step.first_logits, step.logits = first, None
        if not wanted or not count:
            return
        if self._logits is None or len(self._logits) < count:
            self._logits = torch.zeros(count, self.vocabulary)
        step.logits = self._logits.data_ptr()

    def _settle(self, rows: int, ranked: int, greedy: bool) -> Settled:
        step = self._step
        step.rows, step.start, step.accept = rows, self.cache.length, int(greedy)
        step.argmax = addressof(self._argmax) if greedy else None
        self._call()
        count = len(self._guesses) // MOST_GUESSES * ranked
        accepted, following = (step.accepted, step.next) if greedy else (-1, -1)
        return Settled(
            self._row_tokens[:rows],
            self._guesses[:count],
            accepted,
            following,
            step.heads_seconds,
            step.rows_seconds,
        )

    def _call(self) -> None:
        if self._run(self._engine, byref(self._cache), byref(self._step)):
            raise ValueError("a step's rows, tokens or parents are out of range")

    def _cache_of(self, cache: Cache) -> CacheOf:
        buffer = cache.buffer
        layer, head = buffer.stride(1), buffer.stride(2)
        number = FLOAT32 if buffer.dtype == torch.float32 else BFLOAT16
        if buffer.dtype not in (torch.float32, torch.bfloat16) or not buffer.is_contiguous():
            raise UnavailableError(f"the native step does not read a cache of {buffer.dtype}")
        keys, values = buffer[0].data_ptr(), buffer[1].data_ptr()
        return CacheOf(keys, values, layer, head, cache.capacity, number)
