"""The candidate tree: a node is its path of head ranks (paper, section 2.1.2). No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

PAPER_TREES = Path(__file__).parent / "paper_trees.json"
NodePath = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A prefix-closed set of paths; paths[0] is the root (), parents stand before their children.

    Path (2, 0) is: of the guesses of head 1 the third likeliest, followed by the likeliest of head 2.
    Make one with `Tree.of`, which validates.
    """

    paths: tuple[NodePath, ...] = ((),)
    origin: str = "root"

    @classmethod
    def of(cls, paths: Iterable[Iterable[int]], origin: str = "given") -> Tree:
        """A tree of the given paths and the root; raises UserError for a rank below 0, a duplicate or an orphan."""
        listed = [tuple(path) for path in paths]
        for path in listed:
            if not all(type(rank) is int and rank >= 0 for rank in path):
                raise UserError(
                    f"tree {origin}: node {list(path)} is not a list of ranks 0, 1, 2, ..."
                )
        nodes = set(listed) | {()}
        for path in listed:
            if path and path[:-1] not in nodes:
                raise UserError(
                    f"tree {origin}: node {list(path)} is an orphan: {list(path[:-1])} is missing"
                )
        if len(listed) != len(set(listed)):
            twice = next(path for path in listed if listed.count(path) > 1)
            raise UserError(f"tree {origin}: node {list(twice)} is listed twice")
        return cls(tuple(sorted(nodes, key=lambda path: (len(path), path))), origin)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(path) for path in self.paths)

    @property
    def depth(self) -> int:
        return self.depths[-1]

    @property
    def width(self) -> int:
        """How many guesses of a head the tree can use: its largest rank + 1."""
        return max((rank + 1 for path in self.paths for rank in path), default=0)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Row of each node's parent; the root is its own."""
        rows = {path: row for row, path in enumerate(self.paths)}
        return tuple(rows[path[:-1]] for path in self.paths)

    @cached_property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """For each node the rows from the root down to it."""
        branches: list[tuple[int, ...]] = [(0,)]
        for row in range(1, len(self.paths)):
            branches.append((*branches[self.parents[row]], row))
        return tuple(branches)

    def pruned(self, heads: int, width: int) -> Tree:
        """The part that `heads` heads with `width` guesses each can fill."""
        kept = [
            path for path in self.paths if len(path) <= heads and all(rank < width for rank in path)
        ]
        return self if len(kept) == len(self.paths) else Tree(tuple(kept), self.origin)


@dataclass(frozen=True)
class DynamicTree:
    """A tree whose nodes are chosen anew at each step: the likeliest of a superset, by the heads' own probabilities.

    Attributes:
        superset: the paths to choose from; the root alone for a model without heads, whose guesses are all copied.
        nodes: how many are verified, the root included; no more than the superset has.
    """

    superset: Tree
    nodes: int

    def __post_init__(self) -> None:
        if not 0 < self.nodes <= (len(self.superset) if self.superset.depth else self.nodes):
            raise ValueError(f"cannot choose {self.nodes} nodes of {len(self.superset)}")

    def __len__(self) -> int:
        return self.nodes

    @property
    def origin(self) -> str:
        return f"{'dynamic' if self.superset.depth else 'copies'}-{self.nodes}"

    @property
    def depth(self) -> int:
        return self.superset.depth

    @property
    def width(self) -> int:
        return self.superset.width

    def pruned(self, heads: int, width: int) -> DynamicTree:
        """The part that `heads` heads with `width` guesses each can fill."""
        kept = self.superset.pruned(heads, width)
        return (
            self
            if len(kept) == len(self.superset)
            else DynamicTree(kept, min(self.nodes, len(kept)))
        )


AnyTree = Tree | DynamicTree


def chain(depth: int) -> Tree:
    """The tree of each head's likeliest guess alone."""
    return Tree.of([(0,) * n for n in range(1, depth + 1)], f"chain of {depth}")


def paper_trees() -> dict[str, list[list[int]]]:
    """The released trees by name (FasterDecoding/Medusa, medusa_choices.py, Apache-2.0)."""
    trees: dict[str, list[list[int]]] = json.loads(PAPER_TREES.read_text(encoding="utf-8"))["trees"]
    return trees


def named_tree(name: str) -> Tree:
    """A released tree by name, `chain-N`, or the tree of a JSON file that holds a list of paths."""
    released = paper_trees()
    if name in released:
        return Tree.of(released[name], name)
    if name.startswith("chain-") and name[6:].isdigit() and int(name[6:]) > 0:
        return chain(int(name[6:]))
    file = Path(name).expanduser()
    if not file.is_file():
        shaped = "auto, dynamic-N, static-N, chain-N"
        raise UserError(
            f"unknown tree {name!r}: not {shaped}, a file, or one of {', '.join(released)}"
        )
    try:
        paths = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tree file {name}: {error}") from None
    if not isinstance(paths, list) or not all(isinstance(path, list) for path in paths):
        raise UserError(
            f"the tree file {name} must hold a list of paths, such as [[0], [1], [0, 0]]"
        )
    return Tree.of(paths, name)
