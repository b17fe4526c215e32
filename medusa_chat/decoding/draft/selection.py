"""Which nodes a step verifies, where that is decided step by step: the likeliest of a superset and of a copied chain.

All of it runs on the device, in fixed shapes and without a copy to the host. Shapes: S paths of the superset (the root
included), D its depth, W its width, C tokens of the chain, E = S + C rows to choose from, n nodes that are chosen.
S, D and W may be more than the superset has: paths that are never chosen, and guesses that no path takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.events import COPIED

if TYPE_CHECKING:
    from medusa_chat.decoding.trees.tree import NodePath, Tree


@dataclass(frozen=True)
class Selection:
    """The nodes of a step.

    Attributes:
        rows: [n], ascending: below S a path of the superset, else a token of the chain.
        candidates: [n], the token of each node.
        tensors: the topology of the n nodes.
        joint: [1], row of the superset's path that the chain leaves the superset from; 0 without a chain.
    """

    rows: Tensor
    candidates: Tensor
    tensors: TreeTensors
    joint: Tensor


class Selector:
    """Chooses n of E rows: those whose path is likeliest. Parents stand before their children.

    A path is as likely as the product of its guesses, so no child is likelier than its parent, and the n likeliest
    rows are a tree. A chain follows the superset as far as their tokens agree, and each guess there is as likely as
    the surer of its two proposers says; the rest of the chain is a branch of its own below.
    """

    def __init__(
        self,
        superset: Tree,
        nodes: int,
        chain: int,
        device: torch.device,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        """`shape`: S, D and W, by default those of the superset."""
        self.superset, self.nodes, self.chain = superset, nodes, chain
        self.size, depth, width = shape or (len(superset), superset.depth, superset.width)
        rows, more = self.size + chain, self.size - len(superset)
        # In the table of tokens: all guesses, no token behind a path's end, none on a path that is never chosen, the
        # root's, and the chain's.
        end = depth * width
        places = [[d * width + rank for d, rank in enumerate(path)] for path in superset.paths]
        padded = [path + [end] * (depth - len(path)) for path in places] + [
            [end + 1] * depth
        ] * more
        # [D, S]: for each path the places of its guesses, depth by depth
        self._places = (
            torch.tensor(padded, dtype=torch.long, device=device)
            .view(self.size, depth)
            .T.contiguous()
        )
        own = [
            end + 2,
            *(path[-1] for path in places[1:]),
            *[end] * more,
            *range(end + 3, end + 3 + chain),
        ]
        self._own = torch.tensor(own, device=device)  # [E]: the place of each row's own token
        self._depths = torch.tensor(
            [*superset.depths, *[1] * more, *range(1, chain + 1)], device=device
        )
        above = [*superset.parents, *[0] * more, *([0, *range(self.size, rows)][:chain])]
        self._parents = torch.tensor(above, device=device)
        self._rows = torch.arange(rows, device=device)
        self._ancestors = self._all_ancestors().to(device)
        self._ends = torch.tensor(
            [0.0, float("-inf")], device=device
        )  # log p where the table has no token
        self._no_token = torch.tensor([-1, -1], device=device)
        self._root = torch.zeros(1, dtype=torch.long, device=device)
        self.deepest = max(depth, chain)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """What differs between supersets of one shape."""
        return self._places, self._own, self._depths, self._parents, self._ancestors

    def _all_ancestors(self) -> Tensor:
        """[E, E]; what a chain's tokens see of the superset is known at the step only."""
        size, rows = self.size, self.size + self.chain
        ancestors = torch.zeros(rows, rows, dtype=torch.bool)
        for row, branch in enumerate(self.superset.branches):
            ancestors[row, list(branch)] = True
        ancestors[size:, size:] = torch.ones(self.chain, self.chain, dtype=torch.bool).tril()
        return ancestors

    def along_paths(self, log_p: Tensor) -> Tensor:
        """Of each path its guesses' own log p, 0 behind the last: log_p [D, W] -> [D, S]."""
        return torch.cat([log_p.flatten(), self._ends])[self._places]

    def choose(
        self, root: Tensor, guesses: Tensor, chances: Tensor, chain: Tensor, chain_log_p: Tensor
    ) -> Selection:
        """Choose the n likeliest rows.

        Args:
            root: [1], its token; guesses: [D, W], of each head the likeliest tokens, no token twice.
            chances: [D, S], from `along_paths`: log p of each guess if those before it are right, 0 at most.
            chain, chain_log_p: [C], tokens and their log p, likewise.
        """
        tokens = torch.cat([guesses.flatten(), self._no_token, root, chain])
        if not self.chain:
            return self._laid_out(tokens, _summed(chances), self._root)
        agreed = min(len(self._places), self.chain)
        same = tokens[self._places[:agreed]] == chain[:agreed, None]
        shared = same.cumprod(
            0, dtype=torch.uint8
        )  # along each path, whether it is the chain's beginning so far
        surer = torch.maximum(chances[:agreed], chain_log_p[:agreed, None])
        scores = _summed(
            torch.cat([torch.where(shared.bool(), surer, chances[:agreed]), chances[agreed:]])
        )
        whole = shared.sum(0) == self._depths[: self.size]
        joint = (whole * self._rows[: self.size]).amax()[
            None
        ]  # one path a depth agrees; rows go by depth
        shared_too = self._depths[self.size :] <= self._depths[joint]
        tail = chain_log_p.masked_fill(shared_too, 0.0).cumsum(0) + scores[joint]
        tail = tail.cummin(0).values.masked_fill(
            shared_too, float("-inf")
        )  # rounding may not put a child first
        return self._laid_out(tokens, torch.cat([scores, tail]), joint)

    def _laid_out(self, tokens: Tensor, scores: Tensor, joint: Tensor) -> Selection:
        """The likeliest rows as a tree. tokens: [D * W + 3 + C]; scores: [E]; joint: [1]."""
        rows = scores.argsort(descending=True, stable=True)[: self.nodes].sort().values
        parents, ancestors = self._parents[rows], self._ancestors[rows]
        if self.chain:
            parents = torch.where(rows == self.size + self._depths[joint], joint, parents)
            ancestors = ancestors | ((rows >= self.size)[:, None] & self._ancestors[joint])
        tensors = TreeTensors(
            torch.searchsorted(rows, parents), self._depths[rows], ancestors[:, rows], self.deepest
        )
        return Selection(rows, tokens[self._own[rows]], tensors, joint)

    def paths(self, rows: list[int], joint: int) -> tuple[NodePath, ...]:
        """The chosen rows as paths; a guess of the chain's own is COPIED in place of a rank."""
        known, stem = self.superset.paths, self.superset.paths[joint]
        copied = 1 - self.size - len(stem)
        return tuple(
            known[row] if row < self.size else stem + (COPIED,) * (row + copied) for row in rows
        )


def _summed(chances: Tensor) -> Tensor:
    """Log p of whole paths, added depth by depth: so no rounding makes a child likelier than its parent.

    chances: [D, S] -> [S]
    """
    return chances.cumsum(0)[-1] if len(chances) else chances.sum(0)
