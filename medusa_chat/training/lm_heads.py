"""The layer from a backbone's last hidden states to its logits, in the forms that losses need."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from medusa_chat.model.logits import LogitRule


class _Ruled(nn.Module):
    """An LM head with what its family does to the logits."""

    def __init__(self, lm_head: Any, rule: LogitRule) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.rule = rule
        self.out_features = lm_head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rule(self.lm_head(hidden))


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
    rule = LogitRule.of(backbone.config.get_text_config())
    return lm_head if rule == LogitRule() else _Ruled(lm_head, rule)
