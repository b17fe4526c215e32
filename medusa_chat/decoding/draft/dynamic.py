"""DynamicDraft: the likeliest nodes of each step, among the heads' guesses and the copies."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from medusa_chat.decoding.draft.base import ROWS, Draft, Guessing, Nodes, bucket_of, next_size
from medusa_chat.decoding.draft.copies import CHAIN
from medusa_chat.decoding.draft.filling import Filling
from medusa_chat.decoding.draft.selection import NEVER, Selector
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, Tree
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from medusa_chat.decoding.draft.ranking import Candidates
    from medusa_chat.decoding.numbers import Numbers
    from medusa_chat.decoding.report import PackedInput
    from medusa_chat.decoding.trees.accuracy import Accuracy

RAREST = 1e-6  # frequency of a path that was never right


class DynamicDraft(Draft):
    """The nodes of a dynamic tree, or of a fixed one whose places copies compete for.

    Attributes:
        superset: the paths to choose from.
        copied: whether a copied chain competes for the places.
        measured: [S], log p of each node's guess as it was measured; None if the heads say it.
    """

    def __init__(self, tree: AnyTree, guessing: Guessing, *, copied: bool) -> None:
        """Make the tensors that select the nodes.

        Args:
            tree: the tree in use.
            guessing: describes the heads. With shared buffers, these are large enough for other
                supersets.
            copied: whether a copied chain competes for the places.
        """
        backbone, heads = guessing.backbone, guessing.heads
        shared, device = guessing.shared_buffers, backbone.device
        superset = tree.superset if isinstance(tree, DynamicTree) else tree
        self.superset, self.copied = superset, copied
        self.size = len(tree)
        self.rows = bucket_of(self.size) if shared else self.size
        self._dtype, self._vocabulary = backbone.dtype, backbone.vocabulary
        self.ranked = guessing.ranked(superset)
        self.ranker = guessing.ranker()
        measured = isinstance(tree, Tree) or not self.ranked
        self.needs_log_p = self.ranked > 0 and (self.ranker.reorders or not measured)
        chain = CHAIN if copied else 0
        depth, paths = superset.depth, len(superset)
        if shared and self.ranked:
            depth, paths = heads, next_size(ROWS, paths)
        selector = Selector(superset, self.size, chain, device, (paths, depth), self.rows)
        self._selector = selector
        levels = heads if shared else 0
        self.filling = Filling(superset, self.ranked, device, paths, levels)
        self.deepest = min(self.rows - 1, max(heads, chain))
        sizes = (self.rows, self.ranked, chain, paths, depth)
        self.shape = ("dynamic", *sizes, measured, self._coupling(guessing))
        self.layout = self._layout(
            heads, 1 + self.rows, lambda selection: selector.paths(selection[1:], selection[0])
        )
        self.measured: Tensor | None = None
        if measured:
            self.measured = measured_log_p(superset, guessing.accuracy, paths).to(device)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between drafts of one shape."""
        measured = () if self.measured is None else (self.measured,)
        selection = self._selector.buffers
        return *selection, *self.filling.buffers, *self.ranker.buffers, *measured

    def nodes(self, given: PackedInput, candidates: Candidates, numbers: Numbers, /) -> Nodes:
        """Select the likeliest nodes among the heads' guesses and the copies."""
        filled, guesses = self._filled(given, candidates, numbers)
        log_p = filled.log_p if self.measured is None else self.measured
        assert log_p is not None
        chain, chain_log_p = given.chain(self._selector.chain)
        selection = self._selector.choose(filled.tokens, log_p, chain, chain_log_p)
        chosen = (selection.joint, selection.rows)
        return Nodes(selection.candidates, selection.tensors, chosen, guesses)

    def mask(self, nodes: Nodes, /) -> Tensor | None:
        """Return the additive mask [rows, rows] of the selected nodes."""
        return attention.additive(nodes.tensors.ancestors, self._dtype)


def measured_log_p(superset: Tree, accuracy: Accuracy, rows: int) -> Tensor:
    """Return the log p of each node's guess if those before it are right: [rows].

    It is -inf in rows that the superset does not have.
    """
    shares = {path: log(max(accuracy.frequency(path), RAREST)) for path in superset.paths}
    steps = [min(shares[path] - shares[path[:-1]], 0.0) for path in superset.paths]
    return functional.pad(torch.tensor(steps), (0, rows - len(superset)), value=NEVER)
