"""Linear layers whose weights are laid out once as the CPU's matmul wants them.

oneDNN's bfloat16 matmul has a blocked weight layout. Given plain weights it lays them out again at every call, which
at the few rows of a decoding step takes longer than the product itself; torch.compile packs weights ahead for the same
reason, with the operators used here. The products are the same, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 16  # the row count that the layout is chosen for; any other works too


class PackedLinear(nn.Module):
    """A linear layer for inference, its weight kept in oneDNN's layout alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return product


def pack_linears(model: nn.Module) -> None:
    """Pack every bfloat16 nn.Linear of a model on a CPU where oneDNN computes in bfloat16; others stay as they are."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
