"""What the native step reads of a model and its cache; nothing here imports them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Description(Protocol):
    """Facts that decide if the native step can run a backbone."""

    @property
    def config(self) -> Any:
        """The transformers config of the text part."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights that are not quantized, and of the cache."""


class Backbone(Description, Protocol):
    """A transformers model with its weights."""

    model: Any

    @property
    def lm_head(self) -> Any:
        """The linear layer from hidden states to logits."""

    @property
    def context(self) -> int:
        """Positions that the model was made for."""

    @property
    def vocabulary(self) -> int:
        """Rows of the LM head."""


class HeadVocabulary(Protocol):
    """The tokens that heads rank: long [N]."""

    tokens: Tensor


class ParentBias(Protocol):
    """A bias by the parent's token: first [P, rank], second [N, rank], rows of `first` [V]."""

    first: Any
    second: Any
    rows: Tensor | None


class Heads(Protocol):
    """Medusa heads: weight [L, K, hidden, hidden], bias [L, K, hidden], lm_heads or None."""

    weight: Any
    bias: Any
    lm_heads: Any
    vocabulary: Any
    parent_bias: Any

    @property
    def heads(self) -> int:
        """Number of heads, K."""

    @property
    def layers(self) -> int:
        """Number of blocks of a head, L."""


class Cache(Protocol):
    """Keys and values of one text, [2, layers, kv_heads, capacity, head_dim]."""

    buffer: Tensor
    length: int

    @property
    def capacity(self) -> int:
        """Positions that the buffer can hold."""

    def commit(self, rows: tuple[int, ...]) -> None:
        """Keep rows of the last forward as the text's next positions."""
