"""MedusaHeads: residual blocks on the last hidden state, then an LM head of their own or the backbone's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_chat.model.linear.packed import pack_linear
from medusa_chat.model.linear.quantization import quantize_linear

if TYPE_CHECKING:
    from medusa_chat.config import Quant


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


class LinearHeads(nn.Module):
    """The same heads for decoding alone, each matrix a linear layer that may be quantized or packed.

    Attributes:
        first: [hidden] -> [K * hidden], the first blocks of all heads, which read the same rows.
        blocks: [hidden] -> [K * hidden], the further L - 1 layers, each of all heads in one matrix.
        lm_heads: one for each head, or none where `lm_head` or the backbone's own is shared.
        lm_head: a quantized copy of the backbone's LM head, for guesses alone; or None.
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
        self.heads, self.layers = heads, 1 + len(blocks)
        self.first, self.blocks = first, nn.ModuleList(blocks)
        self.lm_heads, self.lm_head = nn.ModuleList(lm_heads), lm_head

    def features(self, hidden: Tensor) -> Tensor:
        """The blocks alone: [n, hidden] -> [K, n, hidden]."""
        x = hidden + functional.silu(
            self.first(hidden).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        )
        for block in self.blocks:
            # Every head's rows meet every head's matrix: one matmul that reads each weight once, as K small ones
            # would, and costs one call. [K, n, K * hidden] -> [n, hidden, K], head by head its own.
            own = block(x).unflatten(-1, (self.heads, -1)).diagonal(dim1=0, dim2=2)
            x = x + functional.silu(own.movedim(-1, 0))
        return x

    def logits(self, hidden: Tensor, lm_head: nn.Module) -> Tensor:
        """Guesses of every head: [n, hidden] -> [K, n, V]; `lm_head` is the backbone's."""
        x = self.features(hidden)
        if len(self.lm_heads):
            return torch.stack(
                [linear(rows) for linear, rows in zip(self.lm_heads, x, strict=True)]
            )
        shared: Tensor = (self.lm_head or lm_head)(x)
        return shared


Heads = MedusaHeads | LinearHeads


def decoding_heads(
    heads: MedusaHeads, quant: Quant, device: torch.device, dtype: torch.dtype, lm_head: Any
) -> Heads:
    """Heads in the form that decodes fastest, on `device`; the heads given are used up, stack by stack.

    Args:
        quant: of their matrices. Heads that share the backbone's LM head then guess with a copy of it in `quant`.
        dtype: of everything else.
        lm_head: the backbone's.
    """
    # oneDNN lays out the stacks again at every step, unless each of their matrices is packed.
    if quant == "none" and (device.type, dtype) != ("cpu", torch.bfloat16):
        return heads.to(device, dtype).requires_grad_(False)

    def convert(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        layer: nn.Module = pack_linear(quantize_linear(linear, quant, device))
        return layer

    count, weight, bias, own = heads.heads, heads.weight.data, heads.bias.data, heads.lm_heads
    del heads.weight, heads.bias
    heads.lm_heads = None
    first, *blocks = [
        convert(each.flatten(0, 1), its.flatten()) for each, its in zip(weight, bias, strict=True)
    ]
    del weight
    if own is not None:
        return LinearHeads(count, first, blocks, [convert(own.data[k]) for k in range(count)], None)
    copied = quant != "none" and type(lm_head) is nn.Linear
    return LinearHeads(count, first, blocks, [], convert(lm_head.weight.data) if copied else None)
