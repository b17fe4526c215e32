"""The candidate tree: a node is its path of head ranks (paper, section 2.1.2). No torch here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.config import MAX_NODES, UserError
from medusa_chat.files import expanded, read_json
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterable

PAPER_TREES = Path(__file__).parent / "paper_trees.json"
NodePath = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A prefix-closed set of paths; `Tree.of` makes and checks one.

    The path (2, 0) is the third likeliest guess of head 1, followed by the likeliest of head 2.

    Attributes:
        paths: the path of each node; the first is the root's, (), and parents precede children.
        origin: name of the tree.
    """

    paths: tuple[NodePath, ...] = ((),)
    origin: str = "root"

    @classmethod
    def of(cls, paths: Iterable[Iterable[int]], origin: str = "given") -> Tree:
        """Make the tree of these paths and the root.

        Raises:
            UserError: a path is listed twice, lacks its prefix, or is no list of ranks from 0.
        """
        listed = [tuple(path) for path in paths]
        nodes: set[NodePath] = {()}
        for path in listed:
            if not all(type(rank) is int and rank >= 0 for rank in path):
                raise UserError(
                    f"tree {origin}: node {list(path)} is not a list of ranks 0, 1, 2, ..."
                )
            nodes.add(path)
        for path in listed:
            if path[:-1] not in nodes:
                parent = list(path[:-1])
                raise UserError(
                    f"tree {origin}: node {list(path)} is an orphan: {parent} is missing"
                )
        if len(listed) > len(set(listed)):
            twice = next(path for path in listed if listed.count(path) > 1)
            raise UserError(f"tree {origin}: node {list(twice)} is listed twice")
        return cls(tuple(sorted(nodes, key=lambda path: (len(path), path))), origin)

    def __len__(self) -> int:
        return len(self.paths)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: each step looks for what was made for its tree."""
        return hash((self.paths, self.origin))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node; the root's is 0."""
        return tuple(len(path) for path in self.paths)

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return self.depths[-1]

    @property
    def width(self) -> int:
        """Guesses of a head that the tree can use: its largest rank + 1."""
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
        kept = tuple(
            path for path in self.paths if len(path) <= heads and max(path, default=0) < width
        )
        return self if len(kept) == len(self) else Tree(kept, self.origin)


@dataclass(frozen=True)
class DynamicTree:
    """A tree of the likeliest nodes of a superset, chosen at each step by the heads' probabilities.

    Attributes:
        superset: the paths to choose from; the root alone if all guesses are copied.
        nodes: nodes of a step, the root included; no more than the superset has.
    """

    superset: Tree
    nodes: int

    def __post_init__(self) -> None:
        most = len(self.superset) if self.superset.depth else self.nodes
        if not 0 < self.nodes <= most:
            raise ValueError(f"cannot choose {self.nodes} nodes of {len(self.superset)}")

    def __len__(self) -> int:
        return self.nodes

    @property
    def origin(self) -> str:
        """Name of the tree."""
        return f"{'dynamic' if self.superset.depth else 'copies'}-{self.nodes}"

    @property
    def depth(self) -> int:
        """Depth of the superset's deepest node."""
        return self.superset.depth

    @property
    def width(self) -> int:
        """Guesses of a head that the superset can use."""
        return self.superset.width

    def pruned(self, heads: int, width: int) -> DynamicTree:
        """The part that `heads` heads with `width` guesses each can fill."""
        kept = self.superset.pruned(heads, width)
        if kept is self.superset:
            return self
        return DynamicTree(kept, min(self.nodes, len(kept)))


AnyTree = Tree | DynamicTree


def chain(depth: int) -> Tree:
    """The tree of each head's likeliest guess alone."""
    return Tree.of([(0,) * n for n in range(1, depth + 1)], f"chain of {depth}")


def paper_trees() -> dict[str, list[list[int]]]:
    """The released trees by name (FasterDecoding/Medusa, medusa_choices.py, Apache-2.0)."""
    trees: dict[str, list[list[int]]] = json.loads(PAPER_TREES.read_text(encoding="utf-8"))["trees"]
    return trees


def named_tree(name: str) -> Tree:
    """A released tree by name, `chain-N`, or the tree of a JSON file that holds a list of paths.

    Raises:
        UserError: there is no such tree, or the file holds none.
    """
    released = paper_trees()
    if name in released:
        return Tree.of(released[name], name)
    kind, _, depth = name.partition("-")
    if kind == "chain" and re.fullmatch("[0-9]+", depth) and depth.strip("0"):
        return chain(_chain_depth(depth))
    return _read_tree(name, [*released])


def _chain_depth(text: str) -> int:
    if len(text) > len(str(MAX_NODES)) or int(text) >= MAX_NODES:
        raise UserError(
            f"tree chain-{text[:20]}: with its root a tree has at most {MAX_NODES} nodes"
        )
    return int(text)


def _read_tree(name: str, released: list[str]) -> Tree:
    file = expanded(name)
    if not file.is_file():
        raise UserError(
            f"unknown tree {name!r}: not auto, dynamic-N, static-N, chain-N, a file,"
            f" or one of {', '.join(released)}"
        )
    try:
        paths = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tree file {name}: {reason_of(error)}") from None
    if not isinstance(paths, list) or not all(isinstance(path, list) for path in paths):
        raise UserError(
            f"the tree file {name} must hold a list of paths, such as [[0], [1], [0, 0]]"
        )
    return Tree.of(paths, name)
