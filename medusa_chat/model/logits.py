"""What some families do to the logits of their LM head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LogitRule(NamedTuple):
    """The steps from an LM head's output to logits.

    Attributes:
        divisor: Granite divides by it; 1 for none.
        softcap: Gemma keeps logits between this and its negative; 0 for none.
    """

    divisor: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """Read the rule of a text model's config."""
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(divisor, getattr(config, "final_logit_softcapping", None) or 0.0)

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply the rule: [..., V] -> [..., V]."""
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
