"""Linear layers whose weights are laid out once as the CPU's matmul wants them.

oneDNN's matmul has a blocked weight layout. Given plain weights it lays them out again at every call, which at the few
rows of a decoding step takes longer than the product itself; torch.compile packs weights ahead for the same reason,
with the operators used here. In bfloat16 the products are the same, bit for bit. bitsandbytes' 4-bit layers have a
layout of their own, which they would take at their first step; its 8-bit layers have none, and are slow on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medusa_chat.model.linear.quantization import can_pack_4bit

ROWS = 16  # the row count that the layout is chosen for; any other works too


class PackedLinear(nn.Module):
    """A linear layer for inference, its weight kept in oneDNN's layout alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return product


class Int8Linear(nn.Module):
    """bitsandbytes' int8 weights, a scale a row, in oneDNN's integer matmul.

    Activations are the sum of two 8-bit parts, the second for what the first rounds away: 15 bits in all. So an
    outlier costs the others nothing, which LLM.int8() takes care of by 16-bit columns. Every row has a scale of its
    own and integers add up exactly, so that a row's products do not depend on the rows beside it.
    """

    FINE = 252  # steps of the second part in one of the first: -126 to 126

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """weight: int8 [out, in]; scales: [out], so that weight * scales is the 16-bit weight."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias, self._scales = bias, scales.float()
        self._zeros = torch.zeros(self.out_features, dtype=torch.long)
        self._packed = torch.ops.onednn.qlinear_prepack(weight, [ROWS, self.in_features])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        rows = x.reshape(-1, self.in_features).float()
        unit = (
            rows.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(127)
        )
        rows = rows / unit
        coarse = rows.round()
        fine = rows.sub_(coarse).mul_(self.FINE).round_()
        # Unsigned, around 128: the instructions multiply unsigned by signed bytes.
        parts = torch.cat([coarse, fine]).add_(128).to(torch.uint8)
        coarse, fine = torch.ops.onednn.qlinear_pointwise(
            parts,
            1.0,
            128,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        ).chunk(2)
        product = coarse.add_(fine, alpha=1 / self.FINE).mul_(unit)
        if self.bias is not None:
            product += self.bias
        return (
            product.to(x.dtype).unflatten(0, x.shape[:-1]) if x.dim() != 2 else product.to(x.dtype)
        )


def pack_linears(model: nn.Module) -> None:
    """Lay out every linear layer of a model on a CPU that the CPU has a layout for; others stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packed = pack_linear(child)
            if packed is not child:
                setattr(parent, name, packed)


def pack_linear(layer: Any) -> Any:
    """The layer with its weight laid out, the plain weight gone; any other module as it is."""
    if type(layer).__name__ == "Linear4bit" and can_pack_4bit(layer):
        _pack_4bit(layer)
    elif (
        type(layer).__name__ == "Linear8bitLt"
        and layer.weight.device.type == "cpu"
        and _has_integer_dots()
    ):
        state, weight = layer.state, layer.weight
        scales = (
            state.SCB if weight.SCB is None else weight.SCB
        )  # where they are depends on whether it ever ran
        return Int8Linear(weight.data, scales / 127, layer.bias)
    elif (
        type(layer) is nn.Linear
        and layer.weight.dtype == torch.bfloat16
        and layer.weight.device.type == "cpu"
    ):
        return PackedLinear(layer) if _has_bfloat16() else layer
    return layer


def leave_files(model: nn.Module) -> None:
    """Take a model's last weights out of their files.

    Embeddings, norms and biases are parts of mapped files as they were loaded, and keep whole shards in memory.
    """
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            if tensor.device.type == "cpu" and (
                tensor.dim() == 1 or not isinstance(module, nn.Linear)
            ):
                tensor.data = tensor.data.clone()


def _pack_4bit(layer: Any) -> None:
    """What the layer's forward would do, but at load."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )


def _has_bfloat16() -> bool:
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _has_integer_dots() -> bool:
    """Without these instructions oneDNN adds pairs of products up in 16 bits, which may overflow."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())
