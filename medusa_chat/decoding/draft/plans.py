"""What a step's nodes are on the device, and what of its result the host is told: for a fixed tree, and for a choice.

A plan holds the buffers that do not change from step to step, so that a step makes as few tensors as it can. Plans of
one `shape` differ in the values of their `buffers` alone: what was recorded of one does for another whose values are
copied in.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.draft.selection import Selector
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, NodePath, Tree
from medusa_chat.events import proposer
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from collections.abc import Hashable

    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.model.backbone import Backbone

RAREST = 1e-6  # a path that was never seen to hold counts as this frequent
RANKED = 10  # guesses of each head that a step takes at least, and tells the host at most
ROWS = 64  # what is recorded once for several sizes has room for so many at least


def room(least: int, wanted: int) -> int:
    """`least`, doubled until it holds `wanted`: few sizes in all, none twice as large as it has to be."""
    while least < wanted:
        least *= 2
    return least


@dataclass(frozen=True)
class Outcome:
    """What a step settled.

    Attributes:
        paths: the path of every node, the root's first; a guess that only the copies made is COPIED in it.
        candidates: the token of every node.
        rows: rows of the accepted path, root first; their keys and values are committed.
        next: the token behind the path, root of the next step.
        guesses: guesses[k - 1]: the likeliest tokens of head k, likeliest first; empty where no heads ran.
    """

    paths: tuple[NodePath, ...]
    candidates: list[int]
    rows: tuple[int, ...]
    next: int
    guesses: list[list[int]]

    def tested(self, parents_kept: int) -> tuple[int, ...]:
        """Who proposed a child of one of the accepted path's first `parents_kept` nodes, once for each depth."""
        parents = {self.paths[row] for row in self.rows[:parents_kept]}
        behind = {(len(path), proposer(path)) for path in self.paths[1:] if path[:-1] in parents}
        return tuple(sorted(head for _, head in behind))


@dataclass(frozen=True)
class Nodes:
    """The rows of a step's forward.

    Attributes:
        candidates: [n], their tokens.
        told: what the host learns of them beside their tokens, in the plan's own order.
    """

    candidates: Tensor
    tensors: TreeTensors
    told: tuple[Tensor, ...]


def to_send(root: int, copied: Copied | None) -> list[float]:
    """What the host sends to a step's plan: the root and the copies. As double, which holds every token id exactly."""
    return [root, *copied.tokens, *copied.log_p] if copied else [root]


class FixedDraft:
    """The same nodes at every step.

    Attributes:
        ranked: how many guesses of each head it takes; 0 where no heads are needed.
        deepest: how deep any plan of this shape may be.
    """

    confident = False  # whether it needs to know how sure the heads are

    def __init__(self, tree: Tree, heads: int, backbone: Backbone) -> None:
        """`heads`: how many there are."""
        self.tree, self.size = tree, len(tree)
        self.ranked = _ranked(tree, heads, backbone)
        self.deepest = min(self.size - 1, heads)
        self.shape: Hashable = ("fixed", self.size, self.ranked)
        self.tensors = TreeTensors.of(tree, backbone.device)
        self._mask = (
            attention.additive(self.tensors.ancestors, backbone.dtype) if len(tree) > 1 else None
        )
        # Where in the root and the flattened guesses [1 + heads * ranked] each node's token stands.
        tokens = [0, *(1 + (len(path) - 1) * self.ranked + path[-1] for path in tree.paths[1:])]
        self._tokens = torch.tensor(tokens, device=backbone.device)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return self._tokens, self.tensors.parents, self.tensors.depths, self.tensors.ancestors

    @property
    def tells(self) -> int:
        """How many numbers the nodes are told in."""
        return self.size

    def nodes(self, sent: Tensor, guesses: Tensor, log_p: Tensor | None) -> Nodes:
        """Lay the guesses [heads, ranked] out behind the root, sent[0]."""
        known = torch.cat([sent[:1].long(), guesses.flatten()])
        return Nodes(known[self._tokens], self.tensors, ())

    def mask(self, nodes: Nodes) -> Tensor | None:
        """Additive [n, n], or None for the root alone."""
        return self._mask

    def outcome(self, settled: list[int]) -> Outcome:
        """From the accepted row, the token behind it, the nodes' tokens, what `nodes` tells, and `told_guesses`."""
        row, following, *told = settled
        n = self.size
        return Outcome(
            self.tree.paths,
            told[:n],
            self.tree.branches[row],
            following,
            _by_head(told[n:], self.ranked),
        )


class DynamicDraft:
    """The likeliest nodes of each step: of a dynamic tree, or of a fixed one among which copies seek places.

    Attributes: those of FixedDraft.
    """

    def __init__(
        self,
        tree: AnyTree,
        copied: bool,
        heads: int,
        accuracy: Accuracy,
        backbone: Backbone,
        roomy: bool = False,
    ) -> None:
        """`roomy`: make the buffers large enough for other supersets, so that more plans are of one shape."""
        superset = tree.superset if isinstance(tree, DynamicTree) else tree
        device = backbone.device
        self.size, self._dtype = len(tree), backbone.dtype
        self.confident = isinstance(tree, DynamicTree)
        self.ranked = _ranked(superset, heads, backbone)
        chain = CHAIN if copied else 0
        self._depth, self._width, rows = superset.depth, superset.width, len(superset)
        if roomy and self.ranked:
            self._depth, self._width, rows = heads, self.ranked, room(ROWS, rows)
        self.selector = Selector(
            superset, self.size, chain, device, (rows, self._depth, self._width)
        )
        self.deepest = min(self.size - 1, max(heads, chain))
        self.shape: Hashable = (
            "chosen",
            self.size,
            self.ranked,
            chain,
            rows,
            self._depth,
            self._width,
            self.confident,
        )
        self._shares = None
        if not self.confident:
            self._shares = torch.full((self._depth, rows), -inf, device=device)
            self._shares[:, : len(superset)] = torch.tensor(
                _log_shares(superset, accuracy, self._depth), device=device
            )
        fitted = [accuracy.calibration_of(head) for head in range(1, self._depth + 1)]
        lines = torch.tensor(fitted, device=device).view(self._depth, 2, 1)
        self._scale, self._shift = lines.unbind(1)  # [D, 1] each

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        shares = () if self._shares is None else (self._shares,)
        return *self.selector.buffers, self._scale, self._shift, *shares

    @property
    def tells(self) -> int:
        """How many numbers the nodes are told in."""
        return 2 * self.size + 1

    def nodes(self, sent: Tensor, guesses: Tensor, log_p: Tensor | None) -> Nodes:
        """Choose among the guesses [heads, ranked], log_p the same, and the copies sent behind the root."""
        guesses, behind = guesses[: self._depth, : self._width], 1 + self.selector.chain
        tokens, chain_log_p = (
            sent[:behind].long(),
            sent[behind : behind + self.selector.chain].float(),
        )
        chances = self._shares
        if chances is None:
            own = None if log_p is None else log_p[: self._depth, : self._width]
            calibrated = (
                self._shift if own is None else (self._scale * own + self._shift).clamp(max=0)
            )
            chances = self.selector.along_paths(calibrated)
        selection = self.selector.choose(tokens[:1], guesses, chances, tokens[1:], chain_log_p)
        return Nodes(selection.candidates, selection.tensors, (selection.joint, selection.rows))

    def mask(self, nodes: Nodes) -> Tensor | None:
        """Additive [n, n]."""
        return attention.additive(nodes.tensors.ancestors, self._dtype)

    def outcome(self, settled: list[int]) -> Outcome:
        """From the accepted row, the token behind it, the nodes' tokens, what `nodes` tells, and `told_guesses`."""
        row, following, *told = settled
        n = self.selector.nodes
        candidates, joint, rows, guesses = (
            told[:n],
            told[n],
            told[n + 1 : 2 * n + 1],
            told[2 * n + 1 :],
        )
        paths = self.selector.paths(rows, joint)
        where = {path: place for place, path in enumerate(paths)}
        branch = tuple(where[paths[row][:depth]] for depth in range(len(paths[row]) + 1))
        return Outcome(paths, candidates, branch, following, _by_head(guesses, self.ranked))


def told_guesses(guesses: Tensor) -> Tensor:
    """Those that the host is told, of [heads, ranked]: the likeliest RANKED of each head, head by head."""
    return guesses[:, :RANKED].flatten()


def _ranked(tree: Tree, heads: int, backbone: Backbone) -> int:
    """How many guesses of each head are taken, so that trees of about this width take as many; 0 if it needs none."""
    return min(room(RANKED, tree.width), backbone.vocabulary) if heads and tree.width else 0


def _by_head(guesses: list[int], ranked: int) -> list[list[int]]:
    told = max(min(ranked, RANKED), 1)
    return [guesses[start : start + told] for start in range(0, len(guesses), told)]


def _log_shares(tree: Tree, accuracy: Accuracy, depth: int) -> list[list[float]]:
    """[D, S]: along each path the log p of each guess if those before it are right, as measured; 0 behind the last."""
    shares = {path: log(max(accuracy.frequency(path), RAREST)) for path in tree.paths}
    steps = [
        [
            min(shares[path[:d]] - shares[path[: d - 1]], 0.0) if d <= len(path) else 0.0
            for path in tree.paths
        ]
        for d in range(1, depth + 1)
    ]
    return steps
