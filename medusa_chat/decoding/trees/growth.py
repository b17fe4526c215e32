"""Grow trees from how often the heads are right (paper, section 2.3.3). No torch here."""

from __future__ import annotations

import heapq
import re
from itertools import accumulate
from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, NodePath, Tree, named_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from medusa_chat.decoding.trees.accuracy import Accuracy, Frequencies

SUPERSET = 256  # paths that a dynamic tree is chosen from


def likeliest(
    frequency: Callable[[NodePath], float], widths: Sequence[int], count: int
) -> list[tuple[NodePath, float]]:
    """Find the `count` most frequent paths and their frequencies, most frequent first.

    `widths[k]` is the number of ranks of head k + 1. No path may be more frequent than its prefix.
    So the paths form a tree, and no tree of as many has a larger sum.
    """
    found: list[tuple[NodePath, float]] = []
    frontier: list[tuple[float, NodePath]] = []
    path: NodePath = ()
    while len(found) < count:
        # Every rank of a node's children competes at once: frequencies need not fall with the rank.
        for rank in range(widths[len(path)] if len(path) < len(widths) else 0):
            child = (*path, rank)
            heapq.heappush(frontier, (-frequency(child), child))
        if not frontier:
            break
        negative, path = heapq.heappop(frontier)
        found.append((path, -negative))
    return found


def grow(accuracy: Frequencies, nodes: int) -> tuple[Tree, list[float]]:
    """Grow the best tree of up to `nodes` nodes, root included (paper, section 2.3.3).

    Returns:
        the tree, and the acceptance length of each of its stages: forecast[n - 1] with n nodes.
    """
    found = likeliest(accuracy.frequency, accuracy.widths, nodes - 1)
    forecast = list(accumulate((frequency for _, frequency in found), initial=1.0))
    return Tree.of((path for path, _ in found), "auto"), forecast


def dynamic_tree(accuracy: Frequencies, nodes: int) -> DynamicTree:
    """A tree of `nodes` nodes, chosen at each step from the SUPERSET most frequent paths."""
    superset = grow(accuracy, SUPERSET)[0]
    return DynamicTree(superset, min(nodes, len(superset)))


def kinds(accuracy: Accuracy) -> list[str]:
    """Kinds of trees worth timing: dynamic ones only if their acceptance length was measured."""
    return ["static", "dynamic"] if accuracy.dynamic else ["static"]


def tree_of(kind: str, accuracy: Frequencies, nodes: int) -> AnyTree:
    """The best tree of a kind with up to `nodes` nodes."""
    return dynamic_tree(accuracy, nodes) if kind == "dynamic" else grow(accuracy, nodes)[0]


def shaped_tree(name: str, accuracy: Accuracy) -> AnyTree:
    """The tree of a name: dynamic-N, static-N, or one that `named_tree` knows.

    Raises:
        UserError: there is no such tree.
    """
    kind, _, count = name.partition("-")
    if kind not in ("dynamic", "static") or not re.fullmatch("[0-9]+", count):
        return named_tree(name)
    if len(count) > len(str(SUPERSET)) or not 1 < int(count) <= SUPERSET:
        raise UserError(f"{kind}-N has 2 to {SUPERSET} nodes, not {count[:20]}")
    tree = tree_of(kind, accuracy, int(count))
    return Tree(tree.paths, name) if isinstance(tree, Tree) else tree
