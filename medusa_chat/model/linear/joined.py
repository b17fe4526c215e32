"""Linear layers that read the same rows, joined into one matmul: q, k, v of attention, gate and up of an MLP.

A step of few rows costs what its matmuls' launches and weight reads cost: one wide matrix instead of three reads the
same bytes in one launch, and lets bitsandbytes keep its fused 4-bit kernel at more rows. The modules of transformers
stay as they are: each layer that was joined is replaced by a stand-in that hands out its share of the product.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa_chat.model.linear.quantization import can_pack_4bit

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedLinear(nn.Module):
    """Several linear layers as one.

    Attributes:
        whole: a linear layer of any kind; its output is that of the layers side by side.
        widths: how many columns each of them has.
    """

    def __init__(self, whole: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.whole, self.widths = whole, list(widths)
        self._rows: Tensor | None = None
        self._shares: dict[int, Tensor] = {}

    def share(self, rows: Tensor, index: int) -> Tensor:
        """Columns of layer `index`: [..., in_features] -> [..., widths[index]].

        The product is kept for the other layers until each has had its share, or asks for other rows.
        """
        if rows is not self._rows or index not in self._shares:
            self._rows, self._shares = (
                rows,
                dict(enumerate(self.whole(rows).split(self.widths, -1))),
            )
        share = self._shares.pop(index)
        if not self._shares:
            self._rows = None
        return share


class Share(nn.Module):
    """Stands in for one of the layers of a FusedLinear."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, rows: Tensor) -> Tensor:
        return self.fused.share(rows, self.index)


def fuse_linears(model: nn.Module) -> int:
    """Join what can be joined, layer by layer, so that one layer's weights at most are there twice.

    Layers may be plain or bitsandbytes' own, quantized already. Those that differ in kind, dtype, bias or input stay
    apart. So do 4-bit ones with nested statistics on a GPU: each has an offset of its own, and one could be made of
    them exactly only by giving up the nesting, 0.37 bits a weight, which is what such a model is chosen for. A CPU that
    packs them gives it up anyway, so there they are joined.

    Returns:
        the number of groups joined.
    """
    joined = 0
    for parent in list(model.modules()):
        for names in GROUPS:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            whole = _join(layers)
            if whole is None:
                continue
            fused = FusedLinear(
                whole.train(parent.training), [layer.out_features for layer in layers]
            )
            for index, name in enumerate(names):
                setattr(parent, name, Share(fused, index))
            for layer in layers:
                layer.weight = None  # bitsandbytes' weights refer to their layer: it would go with the next collection
            del layers, layer
            if next(whole.parameters()).is_cuda:
                torch.cuda.empty_cache()  # a wider matrix can't reuse the memory of the narrower ones
            joined += 1
    return joined


def _join(layers: list[Any]) -> Any:
    """One layer that does the work of all, or None where they do not go together."""
    kind = type(layers[0])
    join = {"Linear": _join_plain, "Linear4bit": _join_4bit, "Linear8bitLt": _join_8bit}.get(
        kind.__name__
    )
    if join is None or any(type(layer) is not kind for layer in layers):
        return None
    alike = {
        (
            layer.in_features,
            layer.bias is None,
            layer.weight.dtype,
            layer.weight.device,
            layer.weight.requires_grad,
        )
        for layer in layers
    }
    if len(alike) > 1:
        return None
    whole = join(layers)
    if whole is not None and layers[0].bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in layers])
        whole.bias = nn.Parameter(bias, requires_grad=layers[0].bias.requires_grad)
    return whole


def _join_plain(layers: list[nn.Linear]) -> nn.Linear | None:
    if type(layers[0]) is not nn.Linear:
        return None
    weight = torch.cat([layer.weight.detach() for layer in layers])
    whole = nn.Linear(weight.shape[1], weight.shape[0], layers[0].bias is not None, "meta")
    whole.weight = nn.Parameter(weight, requires_grad=layers[0].weight.requires_grad)
    return whole


def _join_4bit(layers: list[Any]) -> Any:
    """Bitsandbytes' blocks run along a row of the matrix, so matrices of whole blocks can be put below each other."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    first, states = layers[0], [layer.weight.quant_state for layer in layers]
    # On a CPU with AVX-512 the first forward lays a matrix out anew in tiles of rows, with absmax [blocks, rows].
    tiled = {getattr(state, "packing_format_for_cpu", False) for state in states}
    alike = {(state.blocksize, state.quant_type, state.dtype, state.nested) for state in states}
    if len(tiled) > 1 or len(alike) > 1 or first.in_features % states[0].blocksize:
        return None
    if states[0].nested:
        if not all(can_pack_4bit(layer) for layer in layers):
            return None
        states = [_plain_statistics(state) for state in states]
    state = copy.copy(states[0])
    state.shape = torch.Size((sum(layer.out_features for layer in layers), first.in_features))
    state.absmax = torch.cat([each.absmax for each in states], dim=1 if True in tiled else 0)
    whole = Linear4bit(
        state.shape[1],
        state.shape[0],
        first.bias is not None,
        first.compute_dtype,
        False,
        state.quant_type,
        first.quant_storage,
        "meta",
    )
    whole.weight = Params4bit(
        torch.cat([layer.weight.data for layer in layers]),
        False,
        state,
        state.blocksize,
        False,
        state.quant_type,
        first.quant_storage,
        whole,
        True,
    )
    whole.quant_state, whole.compute_type_is_set = state, first.compute_type_is_set
    return whole


def _plain_statistics(nested: Any) -> Any:
    """A quantization's state with its scales in float32, as bitsandbytes computes them to pack a layer."""
    from bitsandbytes.functional import dequantize_blockwise

    state = copy.copy(nested)
    state.absmax = dequantize_blockwise(nested.absmax, nested.state2).add_(nested.offset).float()
    state.nested, state.state2, state.offset = False, None, None
    return state


def _join_8bit(layers: list[Any]) -> Any:
    """Rows of an int8 matrix have a scale each; after the first forward bitsandbytes keeps both in `state`."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    first = layers[0]
    if first.state.has_fp16_weights or len({layer.state.threshold for layer in layers}) > 1:
        return None
    used = [layer.weight if layer.weight.CB is not None else layer.state for layer in layers]
    if any(each.CB is None for each in used):
        return None
    rows, scales = torch.cat([each.CB for each in used]), torch.cat([each.SCB for each in used])
    whole = Linear8bitLt(
        first.in_features,
        len(rows),
        first.bias is not None,
        False,
        first.state.threshold,
        device="meta",
    )
    whole.weight = Int8Params(rows, False, False, CB=rows, SCB=scales)
    return whole
