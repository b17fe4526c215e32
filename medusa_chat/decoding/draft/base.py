"""Draft: the candidate nodes that a step verifies, as tensors of the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from medusa_chat.config import MAX_NODES
from medusa_chat.decoding.draft.guesses import Guesses, ScoredGuesses
from medusa_chat.decoding.draft.ranking import CANDIDATES, Ranker
from medusa_chat.decoding.report import PackedInput, ReportLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    from medusa_chat.decoding.acceptance import Coupling, TreeTensors
    from medusa_chat.decoding.draft.filling import Filled, Filling
    from medusa_chat.decoding.draft.ranking import Candidates, TokenBias
    from medusa_chat.decoding.numbers import Numbers
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.decoding.trees.tree import NodePath, Tree
    from medusa_chat.model.backbone import Backbone

RANKED = 10  # guesses of each head that a step takes at least, and reports at most
MOST_SHOWN = 2 * MAX_NODES  # numbers of a report for each head
ROWS = 64  # paths that shared buffers hold at least
# Rows of steps that are recorded: few of them, so that trees of most sizes share a recording.
BUCKETS = (1, 8, 16, 32, 64, 128, 256)


def next_size(least: int, wanted: int) -> int:
    """Double `least` until it holds `wanted`: few sizes in all, none twice as large as needed."""
    while least < wanted:
        least *= 2
    return least


def bucket_of(nodes: int) -> int:
    """Return the rows of the smallest recorded step that holds so many nodes."""
    return next(rows for rows in BUCKETS if rows >= nodes)


@dataclass(frozen=True)
class Guessing:
    """All that drafts need to know of heads and their backbone.

    Attributes:
        backbone: gives device, dtype and vocabulary.
        heads: how many there are.
        tokens: N, how many the heads rank.
        accuracy: how far the heads are to be trusted, or how often paths are right.
        bias: of guesses by their parent, or None.
        coupling: the noise that guesses are ranked with.
        shared_buffers: fill steps up to a number of rows that other trees have too, so that more
            drafts have one shape.
    """

    backbone: Backbone
    heads: int
    tokens: int
    accuracy: Accuracy
    bias: TokenBias | None = None
    coupling: Coupling = "none"
    shared_buffers: bool = False

    def ranker(self) -> Ranker:
        """Make what ranks the heads' candidates."""
        device = self.backbone.device
        return Ranker(self.accuracy, self.heads, device, self.bias, self.coupling)

    def ranked(self, tree: Tree) -> int:
        """Count the guesses that a tree takes of each head; trees of about one width take alike."""
        if not self.heads or not tree.width:
            return 0
        least = RANKED if self.bias is None and self.coupling == "none" else CANDIDATES
        return min(next_size(least, tree.width), self.tokens)


@dataclass(frozen=True)
class Nodes:
    """The rows of a step's forward.

    Attributes:
        candidates: [rows], the token of each node.
        tensors: the topology of the rows.
        selection: says which nodes were selected, for the report.
        guesses: the heads' guesses, for the report.
    """

    candidates: Tensor
    tensors: TreeTensors
    selection: tuple[Tensor, ...]
    guesses: tuple[Tensor, ...]

    @property
    def reported(self) -> tuple[Tensor, ...]:
        """The parts that a report lists, in its order."""
        return self.candidates, *self.selection, *self.guesses


class Draft(ABC):
    """Lays out the nodes of a step.

    It holds the tensors that stay the same from step to step. Drafts of one `shape` differ in the
    values of their `buffers` alone, so a step that was recorded with one serves all of them.

    Attributes:
        size: nodes, n.
        rows: rows of the forward: as many, or more if steps of several sizes share a recording. A
            row that fills up sees the text and itself, and lies at FILLER_DEPTH.
        ranked: guesses that it takes of each head; 0 if it needs no heads.
        needs_log_p: whether it reads how sure the heads are.
        deepest: no draft of this shape is deeper.
        shape: equal for drafts that differ in the values of their buffers alone.
        layout: of a step's report.
        ranker: ranks the heads' candidates.
        filling: puts them to the nodes of a tree.
    """

    size: int
    rows: int
    ranked: int
    needs_log_p: bool
    deepest: int
    shape: Hashable
    layout: ReportLayout
    ranker: Ranker
    filling: Filling
    _vocabulary: int

    def _layout(
        self, heads: int, selection: int, paths: Callable[[list[int]], tuple[NodePath, ...]]
    ) -> ReportLayout:
        """Lay the report out for so many heads, once `rows`, `ranked` and `ranker` are set."""
        if not self.ranked:
            return ReportLayout(self.rows, selection, 0, paths, no_guesses)
        if not self.ranker.reorders:
            shown = min(self.ranked, RANKED)
            return ReportLayout(self.rows, selection, heads * shown, paths, _listed(heads))
        numbers = 2 * heads * self.ranked
        return ReportLayout(self.rows, selection, numbers, paths, _scored(heads, self.ranker))

    def _coupling(self, guessing: Guessing) -> Coupling:
        """The noise that this draft's shape depends on."""
        return guessing.coupling if self.ranked else "none"

    def _filled(
        self, given: PackedInput, candidates: Candidates, numbers: Numbers
    ) -> tuple[Filled, tuple[Tensor, ...]]:
        """Fill the tree with guesses; returns also what the report says of them."""
        if not self.needs_log_p:
            shown = candidates.tokens[:, :RANKED].flatten()
            return self.filling.plain(given.root, candidates), (shown,)
        ranker = self.ranker
        noise = ranker.noise(candidates, given.position, numbers, self._vocabulary)
        filled = self.filling.ranked(given.root, candidates, ranker, noise)
        if not ranker.reorders:
            return filled, (candidates.tokens[:, :RANKED].flatten(),)
        scores = ranker.shown(candidates, noise).contiguous().view(torch.int32).long()
        return filled, (candidates.tokens.flatten(), scores.flatten())

    @property
    @abstractmethod
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between drafts of one shape."""

    @abstractmethod
    def nodes(self, given: PackedInput, candidates: Candidates, numbers: Numbers, /) -> Nodes:
        """Lay out the nodes of a step.

        Args:
            given: the step's input.
            candidates: the likeliest tokens of each head, with log p if `needs_log_p`.
            numbers: of the sampling.
        """

    @abstractmethod
    def mask(self, nodes: Nodes, /) -> Tensor | None:
        """Return the additive mask [rows, rows] of the nodes; None for the root alone."""


def no_guesses(_numbers: list[int], _root: int) -> Guesses:
    """Return the guesses of a step without heads."""
    return Guesses([])


def _listed(heads: int) -> Callable[[list[int], int], Guesses]:
    def read(numbers: list[int], _root: int) -> Guesses:
        return Guesses(_in_rows(numbers, heads))

    return read


def _scored(heads: int, ranker: Ranker) -> Callable[[list[int], int], Guesses]:
    host = None if ranker.bias is None else ranker.bias.host

    def read(numbers: list[int], root: int) -> Guesses:
        tokens, bits = np.array(numbers, dtype=np.int32).reshape(2, heads, -1)
        return ScoredGuesses(tokens, bits.view(np.float32), root, host)

    return read


def _in_rows(numbers: list[int], heads: int) -> list[list[int]]:
    width = len(numbers) // heads
    return [numbers[head * width :][:width] for head in range(heads)]
