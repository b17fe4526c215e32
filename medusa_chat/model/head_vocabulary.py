"""The tokens that heads rank, where these are not all of the backbone's.

A head that ranks the frequent tokens alone reads a fraction of an LM head's rows (FR-Spec,
arXiv:2502.14856).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadVocabulary(nn.Module):
    """A part of a backbone's vocabulary, which never changes. A module, to move with its heads.

    Attributes:
        tokens: long [N], ascending, the ids that the heads rank.
        size: V, tokens of the backbone.
        rows: long [V], the index of each token in `tokens`, N for any other.
    """

    tokens: Tensor
    rows: Tensor

    def __init__(self, tokens: Tensor, size: int) -> None:
        """Take distinct ids below `size`, in any order."""
        super().__init__()
        ascending = tokens.long().sort().values
        rows = torch.full((size,), len(ascending), device=ascending.device)
        rows[ascending] = torch.arange(len(ascending), device=ascending.device)
        self.size = size
        self.register_buffer("tokens", ascending)
        self.register_buffer("rows", rows, persistent=False)

    def __len__(self) -> int:
        return len(self.tokens)


class VocabularyRows(nn.Module):
    """An LM head that gives the logits of a head vocabulary alone: [..., hidden] -> [..., N].

    Attributes:
        out_features: logits that exist at once: N, or V if the LM head can't leave any out.
    """

    def __init__(self, lm_head: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.tokens = tokens
        self.weight: Tensor | None = None
        if type(lm_head) is nn.Linear and getattr(lm_head, "bias", None) is None:
            self.weight = lm_head.weight[tokens]
        whole: int = lm_head.out_features  # type: ignore[assignment]
        self.out_features = whole if self.weight is None else len(tokens)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply by the rows of the tokens, of a plain LM head, or by all."""
        if self.weight is not None:
            return nn.functional.linear(hidden, self.weight)
        every: Tensor = self.lm_head(hidden)
        return every[..., self.tokens]
