"""Tree attention as a registered transformers attention function, and the masks that it takes.

A step's rows attend to the whole cached text and, among themselves, to their ancestors only. A prefill is the
tree that is a chain. Masks are additive, in the backbone's dtype, so that nothing is converted layer by layer.
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


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of n rows over T cached positions, without repeating the key and value heads of a group.

    Args:
        query: [batch, heads, n, head_dim]; key, value: [batch, kv_heads, T, head_dim].
        attention_mask: additive [batch or 1, 1, n, T], or None where every row sees everything; or a TreeMask.
        s_aux: attention sinks, which some models add to the softmax; not supported.

    Returns:
        [batch, n, heads, head_dim], None
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
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The same for an additive mask or none."""
    batch, heads, rows, size = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        query = query.reshape(batch, key.shape[1], groups * rows, size)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
    if softcap is None:
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
    else:
        scores = softcap * torch.tanh(query @ key.mT * scaling / softcap)
        scores = scores if attention_mask is None else scores + attention_mask
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed.reshape(batch, heads, rows, value.shape[-1]).transpose(1, 2).contiguous()


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """The same for a tree's rows over a fixed span of the cache: [1, heads, n, head_dim] -> [1, n, heads, head_dim]."""
    return masked_attention(query, key, value, mask.additive, scaling, softcap)


# How a TreeMask is attended by: `plain`, `tree_kernel.attend` or a FasterAttention.
Attend = Callable[[Tensor, Tensor, Tensor, "TreeMask", float, float | None], Tensor]


class TreeMask(Tensor):
    """Which of `span` cached positions n rows see that are written from `start` on: all text, and their ancestors.

    transformers hands any 4-D tensor on to the layers as it is. This one is [1, 1, n, n] and carries what a kernel
    needs to do without the mask over the whole span.

    Attributes:
        ancestors: bool [n, n]; positions: [n]; start: [], on the device: the text's length.
        window: positions that a row sees back from itself, or None for all.
    """

    ancestors: Tensor
    positions: Tensor
    start: Tensor
    span: int
    window: int | None
    attend: Attend
    _number: torch.dtype

    @classmethod
    def of(
        cls,
        ancestors: Tensor,
        positions: Tensor,
        start: Tensor,
        span: int,
        number: torch.dtype,
        attend: Attend = plain,
        window: int | None = None,
    ) -> Self:
        """`number`: the dtype of the additive mask, which is the queries'."""
        mask = ancestors[None, None].as_subclass(cls)
        mask.ancestors, mask.positions, mask.start, mask.span = ancestors, positions, start, span
        mask.window, mask.attend, mask._number = window, attend, number
        return mask

    def within(self, window: int) -> TreeMask:
        """The same for a layer that sees less than `window` positions back; the whole text may be shorter."""
        if self.span <= window:
            return self
        return TreeMask.of(
            self.ancestors, self.positions, self.start, self.span, self._number, self.attend, window
        )

    def behind(self, length: int) -> TreeMask:
        """The same rows behind a text of another length."""
        start = torch.full_like(self.start, length)
        positions = self.positions - self.start + start
        return TreeMask.of(
            self.ancestors, positions, start, self.span, self._number, self.attend, self.window
        )

    @cached_property
    def additive(self) -> Tensor:
        """[1, 1, n, span]"""
        allowed = fixed_mask(self.ancestors, self.start, self.span)
        if self.window is not None:
            allowed &= fixed_window(self.positions, self.start, self.span, self.window)
        return additive(allowed, self._number)[None, None]


def register() -> str:
    """Make the function known to transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, tree_attention)
    # Without a mask function of its own a plain forward of the model would get no mask at all, not a causal one.
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME


def chain_mask(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive mask of rows that follow one another: [n, n]."""
    return additive(torch.ones(rows, rows, dtype=torch.bool, device=device).tril(), dtype)


def full_mask(ancestors: Tensor, length: int) -> Tensor:
    """The additive mask of n rows behind `length` cached positions.

    Args:
        ancestors: additive [n, n]: 0 where row i may see row j, the dtype's minimum elsewhere.

    Returns:
        [1, 1, n, length + n]
    """
    return functional.pad(ancestors, (length, 0))[None, None]


def windowed(mask: Tensor, positions: Tensor, length: int, window: int) -> Tensor:
    """`mask` with everything hidden that lies `window` or more positions back. positions: [n]"""
    keys = torch.cat([torch.arange(length, device=positions.device), positions])
    far = keys[None, :] <= positions[:, None] - window
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)


def fixed_mask(ancestors: Tensor, start: Tensor, span: int) -> Tensor:
    """Which of `span` cached positions n rows see that are written from `start` on: all text, and their ancestors.

    Args:
        ancestors: bool [n, n]; start: [], on the device: the text's length.

    Returns:
        bool [n, span]
    """
    node = torch.arange(span, device=start.device) - start
    behind = ancestors[:, node.clamp(0, len(ancestors) - 1)] & (node < len(ancestors))
    return behind | (node < 0)


def fixed_window(positions: Tensor, start: Tensor, span: int, window: int) -> Tensor:
    """Which of those positions are less than `window` back. positions: [n] -> bool [n, span]"""
    place = torch.arange(span, device=start.device)
    node = (place - start).clamp(0, len(positions) - 1)
    keys = torch.where(place < start, place, positions[node])
    return keys > positions[:, None] - window


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as an additive one."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )
