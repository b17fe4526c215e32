"""DynamicDraft: the likeliest nodes of each step, among the heads' guesses and the copies."""

from __future__ import annotations

from itertools import pairwise
from math import inf, log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.draft.base import ROWS, Draft, Nodes, bucket_of, next_size, ranked_guesses
from medusa_chat.decoding.draft.copies import CHAIN
from medusa_chat.decoding.draft.selection import Selector
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, Tree
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from medusa_chat.decoding.report import PackedInput
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.model.backbone import Backbone

RAREST = 1e-6  # frequency of a path that was never right


class DynamicDraft(Draft):
    """The nodes of a dynamic tree, or of a fixed one whose places copies compete for.

    Attributes:
        superset: the paths to choose from.
        copied: whether a copied chain competes for the places.
        lines: scale and shift of each depth.
        measured: log p of each path's last guess, if it is not the heads who say so.
    """

    def __init__(
        self,
        tree: AnyTree,
        *,
        copied: bool,
        heads: int,
        accuracy: Accuracy,
        backbone: Backbone,
        shared_buffers: bool = False,
    ) -> None:
        """Make the tensors that select the nodes.

        Args:
            tree: the tree in use.
            copied: whether a copied chain competes for the places.
            heads: how many there are.
            accuracy: how far the heads are to be trusted, or how often paths are right.
            backbone: gives device and dtype.
            shared_buffers: fill the step up to a number of rows that other trees have too, and
                make the buffers large enough for other supersets, so that more drafts have one
                shape.
        """
        superset = tree.superset if isinstance(tree, DynamicTree) else tree
        self.superset, self.copied = superset, copied
        self.size = len(tree)
        self.rows = bucket_of(self.size) if shared_buffers else self.size
        self._dtype = backbone.dtype
        self.uses_confidence = isinstance(tree, DynamicTree)
        self.ranked = ranked_guesses(superset, heads, backbone)
        chain = CHAIN if copied else 0
        self._depth, self._width, paths = superset.depth, superset.width, len(superset)
        if shared_buffers and self.ranked:
            self._depth, self._width, paths = heads, self.ranked, next_size(ROWS, paths)
        shape = (paths, self._depth, self._width)
        selector = Selector(superset, self.size, chain, backbone.device, shape, self.rows)
        self._selector = selector
        self.deepest = min(self.rows - 1, max(heads, chain))
        self.shape = ("dynamic", self.rows, self.ranked, chain, *shape, self.uses_confidence)
        self.layout = self._layout(
            heads, 1 + self.rows, lambda selection: selector.paths(selection[1:], selection[0])
        )
        self._log_p: Tensor | None = None  # [D, S], of each guess along each path, as measured
        self.measured: list[float] | None = None
        if not self.uses_confidence:
            self._log_p = _measured(superset, accuracy, self._depth, paths).to(backbone.device)
            self.measured = _last_steps(self._log_p, superset)
        self.lines = [accuracy.calibration_of(head) for head in range(1, self._depth + 1)]
        calibration = torch.tensor(self.lines, device=backbone.device).view(self._depth, 2, 1)
        self._scale, self._shift = calibration.unbind(1)  # [D, 1] each

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between drafts of one shape."""
        measured = () if self._log_p is None else (self._log_p,)
        return *self._selector.buffers, self._scale, self._shift, *measured

    def nodes(self, given: PackedInput, guesses: Tensor, log_p: Tensor | None, /) -> Nodes:
        """Select the likeliest nodes among the guesses [heads, ranked] and the copies."""
        guesses = guesses[: self._depth, : self._width]
        chain, chain_log_p = given.chain(self._selector.chain)
        along_paths = self._log_p
        if along_paths is None:
            along_paths = self._selector.along_paths(self._calibrated(log_p))
        selection = self._selector.choose(given.root, guesses, along_paths, chain, chain_log_p)
        return Nodes(selection.candidates, selection.tensors, (selection.joint, selection.rows))

    def _calibrated(self, log_p: Tensor | None) -> Tensor:
        """Turn the heads' own log p [heads, ranked] into that of their guesses being right."""
        if log_p is None:  # no heads: an empty table
            return self._shift
        own = log_p[: self._depth, : self._width]
        return (self._scale * own + self._shift).clamp(max=0)

    def mask(self, nodes: Nodes, /) -> Tensor | None:
        """Return the additive mask [rows, rows] of the selected nodes."""
        return attention.additive(nodes.tensors.ancestors, self._dtype)


def _measured(superset: Tree, accuracy: Accuracy, depth: int, rows: int) -> Tensor:
    """Return the log p of each guess if those before it are right: [depth, rows].

    It is 0 after a path's end, and -inf in rows that the superset does not have.
    """
    shares = {path: log(max(accuracy.frequency(path), RAREST)) for path in superset.paths}
    columns = []
    for path in superset.paths:
        prefixes = [shares[path[:end]] for end in range(len(path) + 1)]
        steps = [min(after - before, 0.0) for before, after in pairwise(prefixes)]
        columns.append(steps + [0.0] * (depth - len(path)))
    columns += [[-inf] * depth] * (rows - len(superset))
    return torch.tensor(columns).view(rows, depth).T.contiguous()


def _last_steps(log_p: Tensor, superset: Tree) -> list[float]:
    """Pick log p of each path's last guess, 0 of the root: log_p [depth, rows]."""
    last = [log_p[depth - 1, row] for row, depth in enumerate(superset.depths) if depth]
    return [0.0, *map(float, last)]
