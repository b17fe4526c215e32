"""Linear layers whose weights are laid out once as the CPU's matmul wants them.

oneDNN's matmul has a blocked weight layout. It lays plain weights out again at every call, which
takes longer than the product itself at the few rows of a decoding step. torch.compile packs
weights ahead for the same reason, with the operators used here. In bfloat16 the products are the
same, bit for bit. bitsandbytes' 4-bit layers have a layout of their own, which they would take at
their first step; its 8-bit layers have none, and are slow on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medusa_chat.model.linear.quantization import can_pack_4bit

ROWS = 16  # the row count that the layout is chosen for; it works for any other too
LARGEST_INT8 = 127


class PackedLinear(nn.Module):
    """A linear layer for inference that keeps its weight in oneDNN's layout only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., in_features] -> [..., out_features]."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return product


class Int8Linear(nn.Module):
    """bitsandbytes' int8 weights, with a scale for each row, in oneDNN's integer matmul.

    An activation is the sum of two 8-bit parts, the second for what the first rounds away: 15 bits
    in all. So an outlier costs the others nothing, for which LLM.int8() needs 16-bit columns. Each
    row has a scale of its own and integers add up exactly, so a row's products do not depend on
    the other rows.
    """

    FINE = 252  # steps of the second part in one step of the first: -126 to 126
    ZERO = 128  # the instructions multiply unsigned by signed bytes

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Lay out int8 weights [out, in] whose 16-bit values are weight * scales[:, None]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._scales = scales.float()
        self._zeros = torch.zeros(self.out_features, dtype=torch.long)
        self._packed = torch.ops.onednn.qlinear_prepack(weight, [ROWS, self.in_features])

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., in_features] -> [..., out_features]."""
        rows = x.reshape(-1, self.in_features).float()
        largest = rows.abs().amax(-1, keepdim=True)
        unit = largest.clamp_(min=torch.finfo(torch.float32).tiny).div_(LARGEST_INT8)
        rows = rows / unit
        coarse = rows.round()
        fine = rows.sub_(coarse).mul_(self.FINE).round_()
        parts = torch.cat([coarse, fine]).add_(self.ZERO).to(torch.uint8)
        coarse, fine = self._product(parts).chunk(2)
        product = coarse.add_(fine, alpha=1 / self.FINE).mul_(unit)
        if self.bias is not None:
            product += self.bias
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, parts: Tensor) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            parts,
            1.0,
            self.ZERO,
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
        )
        return product


def pack_linears(model: nn.Module) -> None:
    """Lay out the linear layers of a model on a CPU that has a layout for them."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packed = pack_linear(child)
            if packed is not child:
                setattr(parent, name, packed)


def pack_linear(layer: Any) -> Any:
    """Return a layer with only its laid-out weight, or any other module unchanged."""
    kind = type(layer).__name__
    if kind == "Linear4bit" and can_pack_4bit(layer):
        _pack_4bit(layer)
    elif kind == "Linear8bitLt" and layer.weight.device.type == "cpu" and has_integer_dots():
        return _pack_8bit(layer)
    elif type(layer) is nn.Linear and has_bfloat16():
        weight = layer.weight
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            return PackedLinear(layer)
    return layer


def detach_from_files(model: nn.Module) -> None:
    """Copy embeddings, norms and biases, which are parts of mapped files as they were loaded.

    Otherwise they keep whole shards in memory.
    """
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            large = tensor.dim() > 1 and isinstance(module, nn.Linear)
            if tensor.device.type == "cpu" and not large:
                tensor.data = tensor.data.clone()


def _pack_4bit(layer: Any) -> None:
    """Pack at load what the layer's first forward would pack."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )


def _pack_8bit(layer: Any) -> Int8Linear:
    weight = layer.weight
    # The first forward moves the scales to `state`.
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return Int8Linear(weight.data, scales / LARGEST_INT8, layer.bias)


def has_bfloat16() -> bool:
    """Return whether oneDNN multiplies in bfloat16 here."""
    mkldnn = torch.backends.mkldnn
    return bool(mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_integer_dots() -> bool:
    """Return whether the CPU has 8-bit dot products.

    Without them oneDNN adds pairs of products up in 16 bits, which may overflow.
    """
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())
