"""FixedDraft: the same nodes at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from medusa_chat.decoding.acceptance import FILLER_DEPTH, TreeTensors
from medusa_chat.decoding.draft.base import Draft, Guessing, Nodes, bucket_of
from medusa_chat.decoding.draft.filling import Filling
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from medusa_chat.decoding.draft.ranking import Candidates
    from medusa_chat.decoding.numbers import Numbers
    from medusa_chat.decoding.report import PackedInput
    from medusa_chat.decoding.trees.tree import Tree


class FixedDraft(Draft):
    """The nodes of a fixed tree, without copies.

    Attributes:
        tree: the tree.
        tensors: its topology, with the rows that fill the step up.
    """

    def __init__(self, tree: Tree, guessing: Guessing) -> None:
        """Lay out a tree for the heads that `guessing` describes."""
        backbone, heads = guessing.backbone, guessing.heads
        device = backbone.device
        self.tree = tree
        self.size = len(tree)
        self.rows = bucket_of(self.size) if guessing.shared_buffers else self.size
        self.ranked = guessing.ranked(tree)
        self.ranker = guessing.ranker()
        self.needs_log_p = self.ranked > 0 and self.ranker.reorders
        self._vocabulary = backbone.vocabulary
        self.deepest = min(self.rows - 1, heads)
        self.shape = ("fixed", self.rows, self.ranked, self._coupling(guessing))
        self.layout = self._layout(heads, 0, lambda _: tree.paths)
        levels = heads if guessing.shared_buffers else 0
        self.filling = Filling(tree, self.ranked, device, self.rows, levels)
        self.tensors = filled_up(TreeTensors.of(tree, device), self.rows)
        self._mask: Tensor | None = None
        if self.size > 1:
            self._mask = attention.additive(self.tensors.ancestors, backbone.dtype)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between drafts of one shape."""
        tensors = self.tensors
        topology = (tensors.parents, tensors.depths, tensors.ancestors)
        return *self.filling.buffers, *self.ranker.buffers, *topology

    def nodes(self, given: PackedInput, candidates: Candidates, numbers: Numbers, /) -> Nodes:
        """Put the heads' guesses to their places after the root."""
        filled, guesses = self._filled(given, candidates, numbers)
        return Nodes(filled.tokens, self.tensors, (), guesses)

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
