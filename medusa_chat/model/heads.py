"""Medusa heads: residual blocks on the last hidden state, then their own or the shared LM head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_chat.model.linear.packed import pack_linear
from medusa_chat.model.linear.quantization import quantize_linear
from medusa_chat.native.model import NativeHeads

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.config import Quant


class MedusaHeads(nn.Module):
    """K heads of L residual blocks x + SiLU(W x + b) each (paper, section 2.1.1).

    The paper has one block a head; released heads may have more. Head k, from 1, guesses the token
    k + 1 places after the hidden state's own token. The heads are stacked, so that each layer of
    all heads is one batched matmul.

    Attributes:
        weight: [L, K, hidden, hidden].
        bias: [L, K, hidden].
        lm_heads: [K, V, hidden]; None if the heads share the backbone's LM head.
    """

    def __init__(self, heads: int, layers: int, hidden: int, vocabulary: int | None = None) -> None:
        """Make heads that guess like the LM head, with LM heads of their own for a `vocabulary`."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, heads, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, heads, hidden))
        self.lm_heads = nn.Parameter(torch.zeros(heads, vocabulary, hidden)) if vocabulary else None

    @property
    def heads(self) -> int:
        """Number of heads, K."""
        return self.weight.shape[1]

    @property
    def layers(self) -> int:
        """Number of blocks of a head, L."""
        return self.weight.shape[0]

    def features(self, hidden: Tensor) -> Tensor:
        """Apply the blocks: [n, hidden] -> [K, n, hidden]."""
        # In the first layer all heads read the same rows, so it is one plain matmul.
        first = functional.linear(hidden, self.weight[0].flatten(0, 1), self.bias[0].flatten())
        x = hidden + functional.silu(_by_head(first, self.heads))
        for weight, bias in zip(self.weight[1:], self.bias[1:], strict=True):
            x = x + functional.silu(torch.baddbmm(bias[:, None], x, weight.mT))
        return x

    def logits(self, hidden: Tensor, lm_head: nn.Module) -> Tensor:
        """Guess with every head: [n, hidden] -> [K, n, V]; `lm_head` is the backbone's."""
        x = self.features(hidden)
        if self.lm_heads is not None:
            return torch.bmm(x, self.lm_heads.mT)
        shared: Tensor = lm_head(x)
        return shared


class LinearHeads(nn.Module):
    """The same heads for decoding only: each matrix is a layer that may be quantized or packed.

    Attributes:
        heads: number of heads, K.
        layers: number of blocks of a head, L.
        first: [hidden] -> [K * hidden], the first blocks of all heads, which read the same rows.
        blocks: [hidden] -> [K * hidden] each, the further L - 1 blocks of all heads.
        lm_heads: [hidden] -> [V] for each head; empty if the heads share one.
        lm_head: a quantized copy of the backbone's LM head, for guesses only; None if the heads
            have LM heads of their own or use the backbone's.
    """

    def __init__(
        self,
        heads: int,
        first: nn.Module,
        blocks: list[nn.Module],
        lm_heads: list[nn.Module],
        lm_head: nn.Module | None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.layers = 1 + len(blocks)
        self.first = first
        self.blocks = nn.ModuleList(blocks)
        self.lm_heads = nn.ModuleList(lm_heads)
        self.lm_head = lm_head

    def features(self, hidden: Tensor) -> Tensor:
        """Apply the blocks: [n, hidden] -> [K, n, hidden]."""
        x = hidden + functional.silu(_by_head(self.first(hidden), self.heads))
        for block in self.blocks:
            # Every head's rows meet every head's matrix, and the diagonal keeps each head's own.
            # This reads each weight once, as K small matmuls would, in one call.
            every = block(x).unflatten(-1, (self.heads, -1))  # [K, n, K, hidden]
            own = every.diagonal(dim1=0, dim2=2)  # [n, hidden, K]
            x = x + functional.silu(own.movedim(-1, 0))
        return x

    def logits(self, hidden: Tensor, lm_head: nn.Module) -> Tensor:
        """Guess with every head: [n, hidden] -> [K, n, V]; `lm_head` is the backbone's."""
        x = self.features(hidden)
        if len(self.lm_heads):
            pairs = zip(self.lm_heads, x, strict=True)
            return torch.stack([own(rows) for own, rows in pairs])
        shared: Tensor = (self.lm_head or lm_head)(x)
        return shared


TorchHeads = MedusaHeads | LinearHeads
Heads = TorchHeads | NativeHeads


def decoding_heads(
    heads: MedusaHeads,
    quant: Quant,
    device: torch.device,
    dtype: torch.dtype,
    lm_head: nn.Module | None,
) -> TorchHeads:
    """Return heads in the form that decodes fastest on a device.

    Args:
        heads: the heads, whose weights are freed on the way unless they are returned.
        quant: quantization of their matrices. Heads that share the backbone's LM head then guess
            with a copy of it in `quant`.
        device: where the heads will run.
        dtype: of everything that is not quantized.
        lm_head: the backbone's; only used for that copy.
    """
    # On a CPU in bfloat16, oneDNN would lay the stacks out again at every step: it needs each
    # matrix packed.
    packed = device.type == "cpu" and dtype == torch.bfloat16
    if quant == "none" and not packed:
        return heads.to(device, dtype).requires_grad_(False)

    def convert(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        layer: nn.Module = pack_linear(quantize_linear(linear, quant, device))
        return layer

    count, own = heads.heads, heads.lm_heads
    first, *blocks = _convert_blocks(heads, convert)
    heads.lm_heads = None
    if own is not None:
        return LinearHeads(count, first, blocks, [convert(weight) for weight in own.data], None)
    shared = None
    if quant != "none" and type(lm_head) is nn.Linear:
        shared = convert(lm_head.weight.data)
    return LinearHeads(count, first, blocks, [], shared)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """Split the columns by head: [n, K * hidden] -> [K, n, hidden]."""
    columns: Tensor = rows.unflatten(-1, (heads, -1))
    return columns.transpose(0, 1)


def _convert_blocks(
    heads: MedusaHeads, convert: Callable[[Tensor, Tensor], nn.Module]
) -> list[nn.Module]:
    """Convert the blocks of all heads, layer by layer, and free them."""
    weights, biases = heads.weight.data, heads.bias.data
    del heads.weight, heads.bias
    pairs = zip(weights, biases, strict=True)
    return [convert(weight.flatten(0, 1), bias.flatten()) for weight, bias in pairs]
