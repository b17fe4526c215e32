"""Medusa heads: residual blocks on the last hidden state, then their own or the shared LM head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_chat.model.head_vocabulary import HeadVocabulary as HeadVocabulary
from medusa_chat.model.head_vocabulary import VocabularyRows
from medusa_chat.model.linear.packed import pack_linear
from medusa_chat.model.linear.quantization import quantize_linear
from medusa_chat.model.parent_bias import ParentBias as ParentBias
from medusa_chat.model.parent_bias import new_parent_bias
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
        lm_heads: [K, N, hidden]; None if the heads share the backbone's LM head.
        vocabulary: the N tokens that the heads rank; None if they rank all V.
        parent_bias: what the token before a guess adds to its logits; None if nothing.
    """

    def __init__(
        self,
        heads: int,
        layers: int,
        hidden: int,
        own: int | None = None,
        *,
        vocabulary: HeadVocabulary | None = None,
        parent_bias: int = 0,
        size: int | None = None,
    ) -> None:
        """Make heads that guess like the LM head.

        Args:
            heads: number of heads, K.
            layers: blocks of a head, L.
            hidden: size of a hidden state.
            own: rows of LM heads of their own, N; None to share the backbone's.
            vocabulary: the tokens that the heads rank; None for all.
            parent_bias: rank of the bias by the parent's token; 0 for none.
            size: V, for the bias of heads without LM heads and vocabulary.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, heads, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, heads, hidden))
        self.lm_heads = nn.Parameter(torch.zeros(heads, own, hidden)) if own else None
        self.vocabulary = vocabulary
        self.parent_bias: ParentBias | None = None
        if parent_bias:
            self.parent_bias = new_parent_bias(parent_bias, size or own or 0, vocabulary)

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
        """Guess with every head, parents apart: [n, hidden] -> [K, n, N].

        `lm_head` is the backbone's. Heads that share it rank its rows of their vocabulary.
        """
        x = self.features(hidden)
        if self.lm_heads is not None:
            return torch.bmm(x, self.lm_heads.mT)
        shared: Tensor = self.shared(lm_head)(x)
        return shared

    def shared(self, lm_head: nn.Module) -> nn.Module:
        """Return the part of the backbone's LM head that the heads rank, for heads that share it.

        The rows of a vocabulary are copied at each call.
        """
        if self.vocabulary is None:
            return lm_head
        return VocabularyRows(lm_head, self.vocabulary.tokens)


class LinearHeads(nn.Module):
    """The same heads for decoding only: each matrix is a layer that may be quantized or packed.

    Attributes:
        heads: number of heads, K.
        layers: number of blocks of a head, L.
        first: [hidden] -> [K * hidden], the first blocks of all heads, which read the same rows.
        blocks: [hidden] -> [K * hidden] each, the further L - 1 blocks of all heads.
        lm_heads: [hidden] -> [N] for each head; empty if the heads share one.
        lm_head: [hidden] -> [N], a copy of the backbone's LM head for guesses only, quantized or
            cut to a vocabulary; None if the heads have LM heads of their own or use the backbone's.
        vocabulary: the N tokens that the heads rank; None if they rank all V.
        parent_bias: what the token before a guess adds to its logits; None if nothing.
    """

    def __init__(
        self,
        heads: int,
        first: nn.Module,
        blocks: list[nn.Module],
        lm_heads: list[nn.Module],
        lm_head: nn.Module | None,
        *,
        vocabulary: HeadVocabulary | None = None,
        parent_bias: ParentBias | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.layers = 1 + len(blocks)
        self.first = first
        self.blocks = nn.ModuleList(blocks)
        self.lm_heads = nn.ModuleList(lm_heads)
        self.lm_head = lm_head
        self.vocabulary = vocabulary
        self.parent_bias = parent_bias

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
        """Guess with every head, parents apart: [n, hidden] -> [K, n, N].

        `lm_head` is the backbone's.
        """
        x = self.features(hidden)
        if len(self.lm_heads):
            pairs = zip(self.lm_heads, x, strict=True)
            return torch.stack([own(rows) for own, rows in pairs])
        if self.lm_head is None and self.vocabulary is not None:
            lm_head = VocabularyRows(lm_head, self.vocabulary.tokens)
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
            with a copy of it in `quant`, of the rows of their vocabulary if they have one.
        device: where the heads will run.
        dtype: of everything that is not quantized.
        lm_head: the backbone's; only used for that copy.
    """
    # On a CPU in bfloat16, oneDNN would lay the stacks out again at every step: it needs each
    # matrix packed.
    packed = device.type == "cpu" and dtype == torch.bfloat16
    shared = _shared_rows(heads, quant, lm_head)
    cut = shared is not None and heads.vocabulary is not None
    if quant == "none" and not packed and not cut:
        return heads.to(device, dtype).requires_grad_(False)

    def convert(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        layer: nn.Module = pack_linear(quantize_linear(linear, quant, device))
        return layer

    count, own, bias = heads.heads, heads.lm_heads, heads.parent_bias
    first, *blocks = _convert_blocks(heads, convert)
    heads.lm_heads = None
    return LinearHeads(
        count,
        first,
        blocks,
        [] if own is None else [convert(weight) for weight in own.data],
        None if shared is None else convert(shared),
        vocabulary=None if heads.vocabulary is None else heads.vocabulary.to(device),
        parent_bias=None if bias is None else bias.to(device, dtype).requires_grad_(False),
    )


def _shared_rows(heads: MedusaHeads, quant: Quant, lm_head: nn.Module | None) -> Tensor | None:
    """Return rows of the backbone's LM head that the heads copy, [N, hidden]; None if none."""
    if heads.lm_heads is not None or type(lm_head) is not nn.Linear:
        return None
    weight = lm_head.weight.data
    if heads.vocabulary is not None:
        return weight[heads.vocabulary.tokens.to(weight.device)]
    return None if quant == "none" else weight


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
