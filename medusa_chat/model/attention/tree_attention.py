"""Tree attention as a registered transformers attention function, and the masks that it takes.

Each row of a step attends to the whole cached text and, among the step's rows, to its ancestors.
A prefill is the tree that is a chain. Masks are additive and in the backbone's dtype, so that no
layer has to convert them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "medusa_tree"


def register() -> str:
    """Register tree attention with transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, tree_attention)
    # Without a mask function a plain forward of the model would get no mask, not a causal one.
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME


def tree_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attend from n rows to T cached positions, without repeating grouped key and value heads.

    Args:
        query: [batch, heads, n, head_dim].
        key: [batch, kv_heads, T, head_dim].
        value: [batch, kv_heads, T, head_dim].
        attention_mask: additive [batch or 1, 1, n, T], None if every row sees everything, or a
            TreeMask.
        scaling: factor of the scores.
        softcap: bound of the scores, applied by tanh; None for no bound.
        s_aux: attention sinks, which are not supported.

    Returns:
        [batch, n, heads, head_dim], and None in place of the attention weights.

    Raises:
        ValueError: the model has attention sinks.
    """
    if s_aux is not None:
        raise ValueError("attention sinks are not supported")
    if isinstance(attention_mask, TreeMask):
        return attention_mask.attend(query, key, value, attention_mask, scaling, softcap), None
    return masked_attention(query, key, value, attention_mask, scaling, softcap), None


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Compute `tree_attention` with an additive mask or none."""
    batch, heads, rows, size = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        query = query.reshape(batch, key.shape[1], groups * rows, size)
        if mask is not None:
            mask = mask.repeat(1, 1, groups, 1)
    if softcap is None:
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling
        )
    else:
        scores = softcap * torch.tanh(query @ key.mT * scaling / softcap)
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed.reshape(batch, heads, rows, value.shape[-1]).transpose(1, 2).contiguous()


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attend over a fixed span by torch's operations, as the reference for the Triton kernel.

    query [1, heads, n, head_dim]; key, value [1, kv_heads, span, head_dim] ->
    [1, n, heads, head_dim].
    """
    return masked_attention(query, key, value, mask.additive, scaling, softcap)


# An implementation of attention over a TreeMask: `torch_attention` or `kernel.attend`.
Attend = Callable[[Tensor, Tensor, Tensor, "TreeMask", float, float | None], Tensor]


class TreeMask(Tensor):
    """The mask of n tree nodes over a fixed span of the cache, with what a kernel needs instead.

    The nodes are written from position `start` on. Each sees all positions before `start` and,
    from there on, its ancestors. transformers passes any 4-D tensor on to the layers unchanged;
    this one is the ancestors, [1, 1, n, n].

    Attributes:
        ancestors: bool [n, n]; row i may see row j.
        positions: [n], the text position of each node.
        start: [], the text's length, on the device.
        span: cached positions that are read.
        window: positions that a node sees back from itself; None for all.
        attend: the implementation that `tree_attention` calls.
        number: dtype of the additive mask, which is that of the queries.
    """

    ancestors: Tensor
    positions: Tensor
    start: Tensor
    span: int
    window: int | None
    attend: Attend
    number: torch.dtype

    @classmethod
    def of(
        cls,
        ancestors: Tensor,
        positions: Tensor,
        start: Tensor,
        span: int,
        number: torch.dtype,
        attend: Attend = torch_attention,
        window: int | None = None,
    ) -> Self:
        """Make a mask of these attributes."""
        mask = ancestors[None, None].as_subclass(cls)
        mask.ancestors = ancestors
        mask.positions = positions
        mask.start = start
        mask.span = span
        mask.number = number
        mask.attend = attend
        mask.window = window
        return mask

    def with_window(self, window: int) -> TreeMask:
        """Return the mask of a layer whose nodes see less than `window` positions back."""
        if self.span <= window:
            return self
        return TreeMask.of(
            self.ancestors, self.positions, self.start, self.span, self.number, self.attend, window
        )

    @cached_property
    def additive(self) -> Tensor:
        """The additive mask over the whole span, [1, 1, n, span]."""
        allowed = self._seen()
        if self.window is not None:
            allowed &= self._in_window(self.window)
        return additive(allowed, self.number)[None, None]

    def _seen(self) -> Tensor:
        """All text, and the ancestors: bool [n, span]."""
        rows = len(self.ancestors)
        node = torch.arange(self.span, device=self.start.device) - self.start
        ancestor = self.ancestors[:, node.clamp(0, rows - 1)] & (node < rows)
        return ancestor | (node < 0)

    def _in_window(self, window: int) -> Tensor:
        """Positions less than `window` back: bool [n, span]."""
        place = torch.arange(self.span, device=self.start.device)
        node = (place - self.start).clamp(0, len(self.positions) - 1)
        keys = torch.where(place < self.start, place, self.positions[node])
        return keys > self.positions[:, None] - window


def chain_mask(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the additive mask of rows that follow one another, [n, n]."""
    return additive(torch.ones(rows, rows, dtype=torch.bool, device=device).tril(), dtype)


def full_mask(ancestors: Tensor, length: int) -> Tensor:
    """Return the additive mask of n rows after `length` cached positions.

    Args:
        ancestors: additive [n, n]: 0 where row i may see row j, the dtype's minimum elsewhere.
        length: cached positions, all of which every row sees.

    Returns:
        [1, 1, n, length + n]
    """
    return functional.pad(ancestors, (length, 0))[None, None]


def windowed(mask: Tensor, positions: Tensor, length: int, window: int) -> Tensor:
    """Hide what lies `window` or more positions back; mask [1, 1, n, length + n], positions [n]."""
    keys = torch.cat([torch.arange(length, device=positions.device), positions])
    far = keys[None, :] <= positions[:, None] - window
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into an additive one."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)
