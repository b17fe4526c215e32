"""The layer from a backbone's last hidden states to its logits, in the forms that losses need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _Capped(nn.Module):
    """An LM head with Gemma's softcap on its logits."""

    def __init__(self, lm_head: Any, softcap: float) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.softcap = softcap
        self.out_features = lm_head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return torch.tanh(logits / self.softcap) * self.softcap


class Frozen(nn.Module):
    """An LM head that passes gradients on to its input, but takes none."""

    def __init__(self, lm_head: Any) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.out_features = lm_head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] of hidden states [..., hidden]."""
        detached = {
            name: weight.detach()
            for name, weight in self.lm_head.named_parameters()
            if weight.requires_grad
        }
        logits: Tensor = functional_call(self.lm_head, detached, (hidden,))
        return logits


def output_layer(backbone: Any) -> nn.Module:
    """The layer from last hidden states to the logits of a transformers causal LM."""
    lm_head: nn.Module = backbone.get_output_embeddings()
    softcap = getattr(backbone.config.get_text_config(), "final_logit_softcapping", None)
    return _Capped(lm_head, softcap) if softcap else lm_head
