"""FixedDraft: the same nodes at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.decoding.draft.base import FILLER_DEPTH, Draft, Nodes, bucket_of, ranked_guesses
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from medusa_chat.decoding.report import PackedInput
    from medusa_chat.decoding.trees.tree import Tree
    from medusa_chat.model.backbone import Backbone


class FixedDraft(Draft):
    """The nodes of a fixed tree, without copies.

    Attributes:
        tree: the tree.
        tensors: its topology, with the rows that fill the step up.
        places: [rows], the place of each node's token among the root and the flattened guesses.
    """

    uses_confidence = False

    def __init__(
        self, tree: Tree, heads: int, backbone: Backbone, *, shared_buffers: bool = False
    ) -> None:
        """Lay out a tree for a model with so many heads.

        Args:
            tree: the tree.
            heads: how many there are.
            backbone: gives device and dtype.
            shared_buffers: fill the step up to a number of rows that other trees have too.
        """
        self.tree = tree
        self.size = len(tree)
        self.rows = bucket_of(self.size) if shared_buffers else self.size
        self.ranked = ranked_guesses(tree, heads, backbone)
        self.deepest = min(self.rows - 1, heads)
        self.shape = ("fixed", self.rows, self.ranked)
        self.layout = self._layout(heads, 0, lambda _: tree.paths)
        self.tensors = filled_up(TreeTensors.of(tree, backbone.device), self.rows)
        self._mask: Tensor | None = None
        if self.size > 1:
            self._mask = attention.additive(self.tensors.ancestors, backbone.dtype)
        guesses = (1 + (len(path) - 1) * self.ranked + path[-1] for path in tree.paths[1:])
        filler = [0] * (self.rows - self.size)
        self.places = torch.tensor([0, *guesses, *filler], device=backbone.device)

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


def filled_up(tree: TreeTensors, rows: int) -> TreeTensors:
    """Add rows at FILLER_DEPTH, each its own parent and only ancestor, up to `rows`."""
    nodes = len(tree.depths)
    ancestors = torch.eye(rows, dtype=torch.bool, device=tree.depths.device)
    ancestors[:nodes, :nodes] = tree.ancestors
    parents = torch.arange(rows, device=tree.parents.device)
    parents[:nodes] = tree.parents
    depths = functional.pad(tree.depths, (0, rows - nodes), value=FILLER_DEPTH)
    return TreeTensors(parents, depths, ancestors, tree.depth)
