"""What a step's nodes are on the device, and what of its result the host is told: for a fixed tree, and for a choice.

A plan holds the buffers that do not change from step to step, so that a step makes as few tensors as it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.decoding.accuracy import Accuracy
from medusa_chat.decoding.copying import CHAIN, Copied
from medusa_chat.decoding.selection import Selector
from medusa_chat.decoding.tree import AnyTree, DynamicTree, NodePath, Tree
from medusa_chat.events import proposer
from medusa_chat.model import attention
from medusa_chat.model.backbone import Backbone

RAREST = 1e-6  # a path that was never seen to hold counts as this frequent


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
        candidates: [n], their tokens; mask: additive [n, n], or None for the root alone.
        told: what the host learns of them beside their tokens, in the plan's own order.
    """

    candidates: Tensor
    tensors: TreeTensors
    mask: Tensor | None
    told: tuple[Tensor, ...]


def to_send(root: int, copied: Copied | None) -> list[float]:
    """What the host sends to a step's plan: the root and the copies. As double, which holds every token id exactly."""
    return [root, *copied.tokens, *copied.log_p] if copied else [root]


class FixedPlan:
    """The same nodes at every step."""

    confident = False  # whether it needs to know how sure the heads are

    def __init__(self, tree: Tree, backbone: Backbone) -> None:
        self.tree, self.size, self.depth, self.width, self.deepest = tree, len(tree), tree.depth, tree.width, tree.depth
        self.tensors = TreeTensors.of(tree, backbone.device)
        self._mask = attention.additive(self.tensors.ancestors, backbone.dtype) if len(tree) > 1 else None
        # Where in the root and the flattened guesses [1 + depth * width] each node's token stands.
        tokens = [0, *(1 + (len(path) - 1) * tree.width + path[-1] for path in tree.paths[1:])]
        self._tokens = torch.tensor(tokens, device=backbone.device)

    def nodes(self, sent: Tensor, guesses: Tensor, log_p: Tensor | None) -> Nodes:
        """Lay the guesses [heads, width or more] out behind the root, sent[0]."""
        known = torch.cat([sent[:1].long(), guesses[: self.depth, : self.width].flatten()])
        return Nodes(known[self._tokens], self.tensors, self._mask, ())

    def outcome(self, settled: list[int], ranked: int) -> Outcome:
        """From the accepted row, the token behind it, the nodes' tokens, what `nodes` tells, and `ranked` guesses of
        each head."""
        row, following, *told = settled
        n = len(self.tree)
        return Outcome(self.tree.paths, told[:n], self.tree.branches[row], following, _by_head(told[n:], ranked))


class ChosenPlan:
    """The likeliest nodes of each step: of a dynamic tree, or of a fixed one among which copies seek places."""

    def __init__(self, tree: AnyTree, copied: bool, accuracy: Accuracy, backbone: Backbone) -> None:
        superset = tree.superset if isinstance(tree, DynamicTree) else tree
        device = backbone.device
        self.size, self.depth, self.width, self._dtype = len(tree), superset.depth, superset.width, backbone.dtype
        self.confident = isinstance(tree, DynamicTree)
        self.selector = Selector(superset, len(tree), CHAIN if copied else 0, device)
        self.deepest = self.selector.deepest
        self._shares = None if self.confident else torch.tensor(_log_shares(superset, accuracy), device=device)
        fitted = [accuracy.calibration_of(head) for head in range(1, self.depth + 1)]
        self._scale, self._shift = torch.tensor(fitted, device=device).view(self.depth, 2, 1).unbind(1)  # [D, 1] each

    def nodes(self, sent: Tensor, guesses: Tensor, log_p: Tensor | None) -> Nodes:
        """Choose among the guesses [heads, width or more], log_p the same, and the copies sent behind the root."""
        guesses, behind = guesses[: self.depth, : self.width], 1 + self.selector.chain
        tokens, chain_log_p = sent[:behind].long(), sent[behind : behind + self.selector.chain].float()
        chances = self._shares
        if chances is None:
            own = None if log_p is None else log_p[: self.depth, : self.width]
            calibrated = self._shift if own is None else (self._scale * own + self._shift).clamp(max=0)
            chances = self.selector.along_paths(calibrated)
        selection = self.selector.choose(tokens[:1], guesses, chances, tokens[1:], chain_log_p)
        mask = attention.additive(selection.tensors.ancestors, self._dtype)
        told = (selection.joint, selection.rows)
        return Nodes(selection.candidates, selection.tensors, mask, told)

    def outcome(self, settled: list[int], ranked: int) -> Outcome:
        """From the accepted row, the token behind it, the nodes' tokens, what `nodes` tells, and `ranked` guesses of
        each head."""
        row, following, *told = settled
        n = self.selector.nodes
        candidates, joint, rows, guesses = told[:n], told[n], told[n + 1 : 2 * n + 1], told[2 * n + 1 :]
        paths = self.selector.paths(rows, joint)
        where = {path: place for place, path in enumerate(paths)}
        branch = tuple(where[paths[row][:depth]] for depth in range(len(paths[row]) + 1))
        return Outcome(paths, candidates, branch, following, _by_head(guesses, ranked))


def _by_head(guesses: list[int], width: int) -> list[list[int]]:
    return [guesses[start : start + width] for start in range(0, len(guesses), max(width, 1))]


def _log_shares(tree: Tree, accuracy: Accuracy) -> list[list[float]]:
    """[D, S]: along each path the log p of each guess if those before it are right, as measured; 0 behind the last."""
    shares = {path: log(max(accuracy.frequency(path), RAREST)) for path in tree.paths}
    steps = [[min(shares[path[:d]] - shares[path[: d - 1]], 0.0) if d <= len(path) else 0.0 for path in tree.paths]
             for d in range(1, tree.depth + 1)]  # fmt: skip
    return steps
