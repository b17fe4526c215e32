"""Linear layers that read the same rows, joined: q, k, v of attention, gate and up of an MLP.

A step of few rows costs as much as its matmuls' launches and weight reads. One wide matrix instead
of three reads the same bytes in one launch, and lets bitsandbytes use its fused 4-bit kernel for
more rows. The modules of transformers stay as they are: each joined layer is replaced by a Share,
which returns its columns of the product.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa_chat.model.linear.quantization import bitsandbytes_layers, can_pack_4bit

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class JoinedLinear(nn.Module):
    """Several linear layers as one.

    Attributes:
        whole: a linear layer of any kind; its output is the layers' outputs, concatenated.
        widths: output columns of each layer.
    """

    def __init__(self, whole: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.whole = whole
        self.widths = list(widths)
        self._product: dict[int, Tensor] = {}
        self._rows: Tensor | None = None

    def share(self, rows: Tensor, index: int) -> Tensor:
        """Return the columns of layer `index`: [..., in_features] -> [..., widths[index]].

        The product is kept until each layer has taken its columns, or one asks for other rows.
        """
        if rows is not self._rows or index not in self._product:
            self._rows = rows
            self._product = dict(enumerate(self.whole(rows).split(self.widths, -1)))
        columns = self._product.pop(index)
        if not self._product:
            self._rows = None
        return columns


class Share(nn.Module):
    """One of the layers of a JoinedLinear."""

    def __init__(self, joined: JoinedLinear, index: int) -> None:
        super().__init__()
        self.joined = joined
        self.index = index

    def forward(self, rows: Tensor) -> Tensor:
        """Return the layer's output: [..., in_features] -> [..., out_features]."""
        return self.joined.share(rows, self.index)


def join_linears(model: nn.Module) -> int:
    """Join the layers of GROUPS, one group at a time, so that few weights exist twice.

    Layers may be plain or bitsandbytes' own. Layers that differ in kind, dtype, bias or input stay
    apart. So do 4-bit layers with nested statistics on a GPU: each has an offset of its own, so
    joining them exactly means giving up the nesting, 0.37 bits a weight, for which such a model is
    chosen. A CPU that packs them gives it up anyway, so there they are joined.

    Returns:
        The number of groups joined.
    """
    parents = list(model.modules())
    return sum(_join_group(parent, names) for parent in parents for names in GROUPS)


def _join_group(parent: nn.Module, names: tuple[str, ...]) -> bool:
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    whole = _join(layers)
    if whole is None:
        return False
    widths = [layer.out_features for layer in layers]
    joined = JoinedLinear(whole.train(parent.training), widths)
    for index, name in enumerate(names):
        setattr(parent, name, Share(joined, index))
    for layer in layers:
        layer.weight = (
            None  # bitsandbytes' weights refer to their layer: only a collection frees it
        )
    if next(whole.parameters()).is_cuda:
        torch.cuda.empty_cache()  # a wider matrix cannot reuse the memory of narrower ones
    return True


def _join(layers: list[Any]) -> Any:
    """Return one layer that computes all, or None if they do not go together."""
    kinds = {type(layer) for layer in layers}
    join = _JOIN.get(type(layers[0]).__name__)
    if join is None or len(kinds) > 1 or len({_traits(layer) for layer in layers}) > 1:
        return None
    whole = join(layers)
    if whole is not None and layers[0].bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in layers])
        whole.bias = nn.Parameter(bias, requires_grad=layers[0].bias.requires_grad)
    return whole


def _traits(layer: Any) -> tuple[object, ...]:
    weight = layer.weight
    return (
        layer.in_features,
        layer.bias is None,
        weight.dtype,
        weight.device,
        weight.requires_grad,
    )


def _join_plain(layers: list[nn.Linear]) -> nn.Linear | None:
    first = layers[0]
    if type(first) is not nn.Linear:
        return None
    weight = torch.cat([layer.weight.detach() for layer in layers])
    whole = nn.Linear(weight.shape[1], weight.shape[0], first.bias is not None, "meta")
    whole.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
    return whole


def _join_4bit(layers: list[Any]) -> Any:
    """Join matrices whose rows are whole blocks of bitsandbytes, so that they can be stacked."""
    first = layers[0]
    states = [layer.weight.quant_state for layer in layers]
    # With AVX-512 the first forward on a CPU lays a matrix out in tiles of rows, with absmax
    # [blocks, rows].
    tiled = {getattr(state, "packing_format_for_cpu", False) for state in states}
    alike = {(state.blocksize, state.quant_type, state.dtype, state.nested) for state in states}
    if len(tiled) > 1 or len(alike) > 1 or first.in_features % states[0].blocksize:
        return None
    if states[0].nested:
        if not all(can_pack_4bit(layer) for layer in layers):
            return None
        states = [plain_statistics(state) for state in states]
    state = copy.copy(states[0])
    rows = sum(layer.out_features for layer in layers)
    state.shape = torch.Size((rows, first.in_features))
    state.absmax = torch.cat([each.absmax for each in states], dim=int(True in tiled))
    return _make_4bit(first, torch.cat([layer.weight.data for layer in layers]), state)


def _make_4bit(like: Any, packed: Tensor, state: Any) -> Any:
    """Make a 4-bit layer of weights that are quantized already."""
    bnb = bitsandbytes_layers()
    rows, columns = state.shape
    kind, storage = state.quant_type, like.quant_storage
    whole = bnb.Linear4bit(
        columns, rows, like.bias is not None, like.compute_dtype, False, kind, storage, "meta"
    )
    whole.weight = bnb.Params4bit(
        packed, False, state, state.blocksize, False, kind, storage, whole, True
    )
    whole.quant_state = state
    whole.compute_type_is_set = like.compute_type_is_set
    return whole


def plain_statistics(nested: Any) -> Any:
    """Return a quantization state with float32 scales, as bitsandbytes computes them to pack."""
    from bitsandbytes.functional import dequantize_blockwise

    state = copy.copy(nested)
    state.absmax = dequantize_blockwise(nested.absmax, nested.state2).add_(nested.offset).float()
    state.nested = False
    state.state2 = None
    state.offset = None
    return state


def _join_8bit(layers: list[Any]) -> Any:
    """Join int8 matrices, whose rows have a scale each."""
    bnb = bitsandbytes_layers()
    first = layers[0]
    threshold = first.state.threshold
    if first.state.has_fp16_weights or len({layer.state.threshold for layer in layers}) > 1:
        return None
    # After the first forward bitsandbytes keeps matrix and scales in `state`.
    used = [layer.weight if layer.weight.CB is not None else layer.state for layer in layers]
    if any(each.CB is None for each in used):
        return None
    rows = torch.cat([each.CB for each in used])
    scales = torch.cat([each.SCB for each in used])
    whole = bnb.Linear8bitLt(
        first.in_features, len(rows), first.bias is not None, False, threshold, device="meta"
    )
    whole.weight = bnb.Int8Params(rows, False, False, CB=rows, SCB=scales)
    return whole


_JOIN = {"Linear": _join_plain, "Linear4bit": _join_4bit, "Linear8bitLt": _join_8bit}
