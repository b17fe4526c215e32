"""FixedDraft: the same nodes at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.decoding.draft.base import Draft, Nodes, ranked_guesses
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from medusa_chat.decoding.report import PackedInput
    from medusa_chat.decoding.trees.tree import Tree
    from medusa_chat.model.backbone import Backbone


class FixedDraft(Draft):
    """The nodes of a fixed tree, without copies.

    Attributes:
        tree: the tree.
        tensors: its topology.
        places: [n], the place of each node's token among the root and the flattened guesses.
    """

    uses_confidence = False

    def __init__(self, tree: Tree, heads: int, backbone: Backbone) -> None:
        """Lay out a tree for a model with so many heads."""
        self.tree = tree
        self.size = len(tree)
        self.ranked = ranked_guesses(tree, heads, backbone)
        self.deepest = min(self.size - 1, heads)
        self.shape = ("fixed", self.size, self.ranked)
        self.layout = self._layout(heads, 0, lambda _: tree.paths)
        self.tensors = TreeTensors.of(tree, backbone.device)
        self._mask: Tensor | None = None
        if self.size > 1:
            self._mask = attention.additive(self.tensors.ancestors, backbone.dtype)
        guesses = (1 + (len(path) - 1) * self.ranked + path[-1] for path in tree.paths[1:])
        self.places = torch.tensor([0, *guesses], device=backbone.device)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between drafts of one shape."""
        tensors = self.tensors
        return self.places, tensors.parents, tensors.depths, tensors.ancestors

    def nodes(self, given: PackedInput, guesses: Tensor, _log_p: Tensor | None, /) -> Nodes:
        """Put the guesses [heads, ranked] to their places after the root."""
        tokens = torch.cat([given.root, guesses.flatten()])
        return Nodes(tokens[self.places], self.tensors)

    def mask(self, _nodes: Nodes, /) -> Tensor | None:
        """Return the additive mask [n, n], which is always the same; None for the root alone."""
        return self._mask
