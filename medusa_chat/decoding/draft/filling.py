"""Fill the nodes of a tree with the guesses of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from medusa_chat.decoding.acceptance import FILLER_DEPTH

if TYPE_CHECKING:
    from medusa_chat.decoding.draft.ranking import Candidates, Noise, Ranker
    from medusa_chat.decoding.trees.tree import Tree


@dataclass(frozen=True)
class Filled:
    """The nodes of a tree with their tokens.

    Attributes:
        tokens: [S], the root's first.
        log_p: float32 [S], of each node's guess if its parent is right, 0 for the root; None if
            the candidates have none.
    """

    tokens: Tensor
    log_p: Tensor | None


class Filling:
    """Puts the guess of its rank to each of a tree's nodes, behind its parent's token.

    Attributes:
        places: [S], the place of each node's guess in the root and the flattened guesses of all
            heads; 0 for the root. Rows beyond the tree's are like the root.
    """

    def __init__(
        self, tree: Tree, ranked: int, device: torch.device, rows: int, levels: int = 0
    ) -> None:
        """Lay out a tree.

        Args:
            tree: the tree.
            ranked: guesses that are ranked of each head.
            device: of the tensors.
            rows: S, at least the tree's nodes.
            levels: depth of the deepest of the trees that share the tensors; 0 if none does.
        """
        more = rows - len(tree)
        guesses = [1 + (len(path) - 1) * ranked + path[-1] for path in tree.paths[1:]]
        self.places = torch.tensor([0, *guesses, *[0] * more], device=device)
        self._parents = torch.tensor([*tree.parents, *[0] * more], device=device)
        ranks = [0, *(path[-1] for path in tree.paths[1:])]
        self._ranks = torch.tensor([*ranks, *[0] * more], device=device)
        depths = torch.tensor(tree.depths, device=device)
        self._depths = functional.pad(depths, (0, more), value=FILLER_DEPTH)
        self._levels = [slice(0, rows)] * levels if levels else levels_of(tree)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between trees of one shape."""
        return self.places, self._parents, self._ranks, self._depths

    def plain(self, root: Tensor, candidates: Candidates) -> Filled:
        """Fill in the heads' own order, without a log p. root: [1]."""
        tokens = torch.cat([root, candidates.tokens.flatten()])
        return Filled(tokens[self.places], None)

    def ranked(
        self, root: Tensor, candidates: Candidates, ranker: Ranker, noise: Noise | None
    ) -> Filled:
        """Fill in the order of a ranker. root: [1]."""
        if ranker.bias is not None:
            return self._level_by_level(root, candidates, ranker, noise)
        found = ranker.rank(candidates, noise)
        tokens = torch.cat([root, candidates.tokens.gather(1, found.order).flatten()])
        log_p = functional.pad(found.log_p.flatten(), (1, 0))
        return Filled(tokens[self.places], log_p[self.places])

    def _level_by_level(
        self, root: Tensor, candidates: Candidates, ranker: Ranker, noise: Noise | None
    ) -> Filled:
        """Fill each level behind the tokens of the one above."""
        tokens = root.expand(len(self.places)).clone()
        log_p = torch.zeros(len(tokens), device=root.device)
        for head, level in enumerate(self._levels):
            parents = tokens[self._parents[level]]
            found = ranker.rank_behind(parents, candidates, head, noise)
            rank = self._ranks[level, None]
            place = found.order.gather(1, rank)[:, 0]
            here = self._depths[level] == head + 1
            tokens[level] = torch.where(here, candidates.tokens[head][place], tokens[level])
            log_p[level] = torch.where(here, found.log_p.gather(1, rank)[:, 0], log_p[level])
        return Filled(tokens, log_p)


def levels_of(tree: Tree) -> list[slice]:
    """Rows of each depth from 1; a tree's rows go by depth."""
    depths = tree.depths
    starts = [depths.index(depth) for depth in range(1, tree.depth + 1)]
    return [slice(*ends) for ends in pairwise([*starts, len(tree)])]
