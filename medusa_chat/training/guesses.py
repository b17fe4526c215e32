"""The rows that one head guesses from in a batch, what is right, and the layer that gives logits.

The parent of a target is the true token before it, as at a node whose path was right so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_chat.model.head_vocabulary import VocabularyRows

if TYPE_CHECKING:
    from medusa_chat.model.heads import MedusaHeads

Projection = nn.Module | Tensor  # an LM head, maybe quantized or adapted, or the weight of one


class HeadRows(NamedTuple):
    """One head's guesses at n places.

    Attributes:
        rows: [n, width], what `projection` turns into logits [n, N].
        wanted: [n], the target's index among the N tokens that heads rank; N for any other.
    """

    rows: Tensor
    wanted: Tensor
    projection: Projection


class ParentProjection(nn.Module):
    """An LM head, and a bias by the parent: [..., hidden + rank] -> [..., N].

    The last columns of a row are the parent's in the bias's first matrix. The others get no
    gradient with `frozen`, which spares a matmul with the LM head.
    """

    def __init__(self, projection: Projection, second: Tensor, *, frozen: bool = False) -> None:
        super().__init__()
        self.projection = projection
        self.second = second
        self.frozen = frozen
        self.out_features = outputs(projection)

    def forward(self, rows: Tensor) -> Tensor:
        """Add the bias to the LM head's logits."""
        rank = self.second.shape[1]
        hidden, parents = rows[..., :-rank], rows[..., -rank:]
        if self.frozen:
            hidden = hidden.detach()
        return project(hidden, self.projection) + functional.linear(parents, self.second)


def head_rows(
    heads: MedusaHeads,
    projection: Projection,
    features: Tensor,
    targets: Tensor,
    parents: Tensor | None,
) -> HeadRows:
    """Return the guesses of one head.

    Args:
        heads: all heads, of which vocabulary and bias are read.
        projection: the head's own LM head, or the rows of the backbone's that the heads rank.
        features: [n, hidden], of this head.
        targets: [n], ids.
        parents: [n], ids of the tokens before the targets; only a bias needs them.
    """
    if heads.vocabulary is not None:
        targets = heads.vocabulary.rows[targets]
    if heads.parent_bias is not None:
        assert parents is not None
        frozen = not features.requires_grad
        features = torch.cat([features, heads.parent_bias.features(parents)], -1)
        projection = ParentProjection(projection, heads.parent_bias.second, frozen=frozen)
    return HeadRows(features, targets, projection)


def head_parents(tokens: Tensor, head: int) -> Tensor:
    """Tokens before the targets of `head`, from 1: ids `head` tokens later, [rows, length].

    Where a row has none, there is no target either.
    """
    return tokens.roll(-head, 1)


def project(rows: Tensor, projection: Projection) -> Tensor:
    """Turn rows [n, width] into logits [n, N]."""
    if isinstance(projection, Tensor):
        return functional.linear(rows, projection.to(rows.dtype))
    logits: Tensor = projection(rows)
    return logits


def outputs(projection: Projection) -> int:
    """Return how many logits a projection gives, or computes on the way."""
    rows = projection.shape[0] if isinstance(projection, Tensor) else projection.out_features
    return int(rows)  # type: ignore[arg-type]


def trained(projection: Projection) -> list[Tensor]:
    """Tensors that a projection computes with and that have a gradient."""
    if isinstance(projection, ParentProjection):
        found = [*trained(projection.projection), projection.second]
    elif isinstance(projection, VocabularyRows) and projection.weight is not None:
        found = [projection.weight]
    else:
        found = [projection] if isinstance(projection, Tensor) else list(projection.parameters())
    return [tensor for tensor in found if tensor.requires_grad]
