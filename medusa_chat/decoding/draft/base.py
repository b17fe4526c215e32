"""Draft: the candidate nodes that a step verifies, as tensors of the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa_chat.decoding.report import PackedInput, ReportLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    from medusa_chat.decoding.acceptance import TreeTensors
    from medusa_chat.decoding.trees.tree import NodePath, Tree
    from medusa_chat.model.backbone import Backbone

RANKED = 10  # guesses of each head that a step takes at least, and reports at most
ROWS = 64  # paths that shared buffers hold at least
# Rows of steps that are recorded: few of them, so that trees of most sizes share a recording.
BUCKETS = (1, 8, 16, 32, 64, 128, 256)
FILLER_DEPTH = -1  # of rows that fill a step up: no rule takes them for the root or a guess


def next_size(least: int, wanted: int) -> int:
    """Double `least` until it holds `wanted`: few sizes in all, none twice as large as needed."""
    while least < wanted:
        least *= 2
    return least


def bucket_of(nodes: int) -> int:
    """Return the rows of the smallest recorded step that holds so many nodes."""
    return next(rows for rows in BUCKETS if rows >= nodes)


def ranked_guesses(tree: Tree, heads: int, backbone: Backbone) -> int:
    """Count the guesses that a tree takes of each head; trees of about one width take as many."""
    if not heads or not tree.width:
        return 0
    return min(next_size(RANKED, tree.width), backbone.vocabulary)


@dataclass(frozen=True)
class Nodes:
    """The rows of a step's forward.

    Attributes:
        candidates: [rows], the token of each node.
        tensors: the topology of the rows.
        selection: says which nodes were selected, for the report.
    """

    candidates: Tensor
    tensors: TreeTensors
    selection: tuple[Tensor, ...] = ()


class Draft(ABC):
    """Lays out the nodes of a step.

    It holds the tensors that stay the same from step to step. Drafts of one `shape` differ in the
    values of their `buffers` alone, so a step that was recorded with one serves all of them.

    Attributes:
        size: nodes, n.
        rows: rows of the forward: as many, or more if steps of several sizes share a recording. A
            row that fills up sees the text and itself, and lies at FILLER_DEPTH.
        ranked: guesses that it takes of each head; 0 if it needs no heads.
        uses_confidence: whether it reads how sure the heads are.
        coupled: whether its guesses are ranked by the noise that their targets will be drawn with.
        deepest: no draft of this shape is deeper.
        shape: equal for drafts that differ in the values of their buffers alone.
        layout: of a step's report.
    """

    size: int
    rows: int
    ranked: int
    uses_confidence: bool
    coupled: bool = False
    deepest: int
    shape: Hashable
    layout: ReportLayout

    def _layout(
        self, heads: int, selection: int, paths: Callable[[list[int]], tuple[NodePath, ...]]
    ) -> ReportLayout:
        """Lay the report out for so many heads, once `rows` and `ranked` are set."""
        ranked = min(self.ranked, RANKED)
        return ReportLayout(self.rows, selection, heads if ranked else 0, ranked, paths)

    @property
    @abstractmethod
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between drafts of one shape."""

    @abstractmethod
    def nodes(self, given: PackedInput, guesses: Tensor, log_p: Tensor | None, /) -> Nodes:
        """Lay out the nodes of a step.

        Args:
            given: the step's input.
            guesses: [heads, ranked], the likeliest tokens of each head.
            log_p: [heads, ranked], how sure the heads are; None without `uses_confidence`.
        """

    @abstractmethod
    def mask(self, nodes: Nodes, /) -> Tensor | None:
        """Return the additive mask [rows, rows] of the nodes; None for the root alone."""
