"""MedusaHeads: residual blocks on the last hidden state, then an LM head of their own or the backbone's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class MedusaHeads(nn.Module):
    """K heads of L residual blocks each (paper, section 2.1.1, with L blocks in general).

    Head k (from 1) guesses the token k + 1 places ahead of the hidden state's own token. The heads are stacked,
    so that each layer of all heads is one batched matmul.

    Attributes:
        weight: [L, K, hidden, hidden], bias: [L, K, hidden]: the blocks x + SiLU(W x + b).
        lm_heads: [K, V, hidden], or None where the backbone's LM head is shared.
    """

    def __init__(self, heads: int, layers: int, hidden: int, vocabulary: int | None = None) -> None:
        """Heads that guess like the LM head until they are trained; own LM heads if `vocabulary` is given."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, heads, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, heads, hidden))
        self.lm_heads = nn.Parameter(torch.zeros(heads, vocabulary, hidden)) if vocabulary else None

    @property
    def heads(self) -> int:
        return self.weight.shape[1]

    @property
    def layers(self) -> int:
        return self.weight.shape[0]

    def features(self, hidden: Tensor) -> Tensor:
        """The blocks alone: [n, hidden] -> [K, n, hidden]."""
        # All heads read the same rows in the first layer, so there it is one plain matmul.
        first = functional.linear(hidden, self.weight[0].flatten(0, 1), self.bias[0].flatten())
        x = hidden + functional.silu(first.unflatten(-1, (self.heads, -1)).transpose(0, 1))
        for weight, bias in zip(self.weight[1:], self.bias[1:], strict=True):
            x = x + functional.silu(torch.baddbmm(bias[:, None], x, weight.mT))
        return x

    def logits(self, hidden: Tensor, lm_head: nn.Linear) -> Tensor:
        """Guesses of every head: [n, hidden] -> [K, n, V]; `lm_head` is the backbone's."""
        x = self.features(hidden)
        if self.lm_heads is not None:
            return torch.bmm(x, self.lm_heads.mT)
        shared: Tensor = lm_head(x)
        return shared
