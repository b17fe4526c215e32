"""Selection of the nodes that a step verifies: the likeliest of a superset and of a copied chain.

It runs on the device, in fixed shapes and without a copy to the host. Shapes: S paths of the
superset (the root included), D its depth, C tokens of the chain, E = S + C rows to choose from, n
nodes that are chosen, R rows of the step. S and D may be more than the superset has: then there are
paths that are never chosen. R may be more than n: then fillers come last, which are row E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from medusa_chat.decoding.acceptance import FILLER_DEPTH, TreeTensors, ancestors_of
from medusa_chat.events import COPIED

if TYPE_CHECKING:
    from medusa_chat.decoding.trees.tree import NodePath, Tree

NEVER = float("-inf")  # log p of a row that is never chosen


@dataclass(frozen=True)
class Selection:
    """The nodes of a step.

    Attributes:
        rows: [R], ascending: below S a path of the superset, below E a token of the chain.
        candidates: [R], the token of each node.
        tensors: the topology of the R rows.
        joint: [1], row of the superset's path from which the chain branches off; 0 without a chain.
    """

    rows: Tensor
    candidates: Tensor
    tensors: TreeTensors
    joint: Tensor


class Selector:
    """Chooses the n of E rows whose path is likeliest, parents before their children.

    A path is as likely as the product of its guesses, so no child is likelier than its parent, and
    the n likeliest rows are a tree. A chain follows the superset as far as their tokens agree, and
    each guess there is as likely as the surer of its two proposers says; the rest of the chain is a
    branch of its own.
    """

    def __init__(
        self,
        superset: Tree,
        nodes: int,
        chain: int,
        device: torch.device,
        shape: tuple[int, int] | None = None,
        step_rows: int | None = None,
    ) -> None:
        """Make the tables; `shape` is S and D, by default those of the superset.

        `step_rows` is R, by default n.
        """
        self.superset, self.nodes, self.chain = superset, nodes, chain
        self.step_rows = step_rows or nodes
        self.size, depth = shape or (len(superset), superset.depth)
        self.deepest = max(depth, chain)
        rows = self.size + chain
        more = self.size - len(superset)
        # [D, S]: for each path its nodes' rows, depth by depth. After a path's end comes row S, and
        # on a path that is never chosen row S + 1.
        above = [branch[1:] for branch in superset.branches]
        padded = [[*rows, *[self.size] * (depth - len(rows))] for rows in above]
        padded += [[self.size + 1] * depth] * more
        along = torch.tensor(padded, dtype=torch.long, device=device)
        self._along = along.view(self.size, depth).T.contiguous()
        depths = [*superset.depths, *[1] * more, *range(1, chain + 1), FILLER_DEPTH]
        self._depths = torch.tensor(depths, device=device)
        before = [0, *range(self.size, rows)][:chain]
        parents = [*superset.parents, *[0] * more, *before, rows]
        self._parents = torch.tensor(parents, device=device)
        # The step alone knows which of the superset's nodes are ancestors of the chain.
        ancestors = ancestors_of(superset, rows + 1)
        chained = torch.ones(chain, chain, dtype=torch.bool).tril()
        ancestors[self.size : rows, self.size : rows] = chained
        self._ancestors = ancestors.to(device)
        self._rows = torch.arange(rows, device=device)
        self._chosen = torch.arange(self.step_rows, device=device) < nodes
        self._itself = torch.eye(self.step_rows, dtype=torch.bool, device=device)
        self._no_log_p = torch.tensor([0.0, NEVER], device=device)  # where there is no token
        self._no_token = torch.tensor([-1, -1], device=device)
        self._root = torch.zeros(1, dtype=torch.long, device=device)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between supersets of one shape."""
        tables = (self._along, self._depths, self._parents, self._ancestors)
        return *tables, self._chosen

    def choose(
        self, tokens: Tensor, log_p: Tensor, chain: Tensor, chain_log_p: Tensor
    ) -> Selection:
        """Choose the n likeliest rows.

        Args:
            tokens: [S], the token of each of the superset's nodes, the root's first.
            log_p: float32 [S], of each node's guess if those before it are right.
            chain: [C], copied tokens.
            chain_log_p: [C], of each copied token if those before it are right.
        """
        steps = torch.cat([log_p, self._no_log_p])[self._along]  # [D, S]
        if not self.chain:
            return self._laid_out(tokens, _summed(steps), self._root)
        agreed = min(len(self._along), self.chain)
        text = torch.cat([tokens, self._no_token])[self._along[:agreed]]
        same = text == chain[:agreed, None]
        # Along each path, whether it is the chain's beginning so far.
        shared = same.cumprod(0, dtype=torch.uint8)
        surer = torch.maximum(steps[:agreed], chain_log_p[:agreed, None])
        joined = torch.where(shared.bool(), surer, steps[:agreed])
        scores = _summed(torch.cat([joined, steps[agreed:]]))
        whole = shared.sum(0) == self._depths[: self.size]
        # One path of each depth agrees with the chain, and rows go by depth.
        joint = (whole * self._rows[: self.size]).amax()[None]
        in_superset = self._depths[self.size : -1] <= self._depths[joint]
        tail = chain_log_p.masked_fill(in_superset, 0.0).cumsum(0) + scores[joint]
        # The minimum keeps rounding from putting a child first.
        tail = tail.cummin(0).values.masked_fill(in_superset, NEVER)
        return self._laid_out(torch.cat([tokens, chain]), torch.cat([scores, tail]), joint)

    def _laid_out(self, tokens: Tensor, scores: Tensor, joint: Tensor) -> Selection:
        """Lay the likeliest rows out as a tree.

        Args:
            tokens: [E], of each row.
            scores: [E], log p of each row's path.
            joint: [1], as a Selection has it.
        """
        filler = len(self._rows)
        likeliest = scores.argsort(descending=True, stable=True)[: self.step_rows]
        likeliest = functional.pad(likeliest, (0, self.step_rows - len(likeliest)))
        rows = likeliest.masked_fill(~self._chosen, filler).sort().values
        parents, ancestors = self._parents[rows], self._ancestors[rows]
        if self.chain:
            first = rows == self.size + self._depths[joint]
            parents = torch.where(first, joint, parents)
            copied = (rows >= self.size) & (rows < filler)
            ancestors = ancestors | (copied[:, None] & self._ancestors[joint])
        tensors = TreeTensors(
            torch.searchsorted(rows, parents),
            self._depths[rows],
            ancestors[:, rows] | self._itself,
            self.deepest,
        )
        filled = torch.cat([tokens, tokens[:1]])  # a filler has the root's token
        return Selection(rows, filled[rows], tensors, joint)

    def paths(self, rows: list[int], joint: int) -> tuple[NodePath, ...]:
        """Turn chosen rows into paths; COPIED replaces a rank where the chain alone guessed.

        Fillers have none.
        """
        known = self.superset.paths
        stem = known[joint]
        before = self.size + len(stem) - 1

        def path(row: int) -> NodePath:
            return known[row] if row < self.size else stem + (COPIED,) * (row - before)

        return tuple(map(path, rows[: self.nodes]))


def _summed(log_p: Tensor) -> Tensor:
    """Sum along paths, depth by depth, so that rounding makes no child likelier: [D, S] -> [S]."""
    return log_p.cumsum(0)[-1] if len(log_p) else log_p.sum(0)
