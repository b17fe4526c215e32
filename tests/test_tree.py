"""Trees: their shape, names, files, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.config import UserError
from medusa_chat.decoding.trees.tree import Tree, chain, named_tree, paper_trees
from tests.helpers.tiny import random_tree

if TYPE_CHECKING:
    from pathlib import Path


def test_a_tree_by_hand() -> None:
    tree = Tree.of([[1], [0, 2], [0], [0, 2, 0]], "hand")
    assert tree.paths == ((), (0,), (1,), (0, 2), (0, 2, 0))
    assert tree.parents == (0, 0, 0, 1, 3)
    assert tree.depths == (0, 1, 1, 2, 3)
    assert tree.branches == ((0,), (0, 1), (0, 2), (0, 1, 3), (0, 1, 3, 4))
    assert (len(tree), tree.depth, tree.width) == (5, 3, 3)
    assert (len(Tree()), Tree().depth, Tree().width) == (1, 0, 0)
    assert Tree.of([[], [0]]).paths == ((), (0,))


@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 60))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_topology_of_random_trees(seed: int, nodes: int) -> None:
    tree = random_tree(seed, nodes, depth=5, width=6)
    assert list(tree.depths) == sorted(tree.depths)
    for row, path in enumerate(tree.paths):
        assert tree.paths[tree.parents[row]] == path[:-1]
        assert tree.parents[row] <= row
        assert [tree.paths[node] for node in tree.branches[row]] == [
            path[:n] for n in range(len(path) + 1)
        ]
    shuffled = Tree.of(reversed(tree.paths), tree.origin)
    assert shuffled == tree
    assert hash(shuffled) == hash(tree)


@pytest.mark.parametrize(
    ("paths", "complaint"),
    [
        ([[0], [1, 0]], r"node \[1, 0\] is an orphan: \[1\] is missing"),
        ([[0], [0, 0, 0]], "orphan"),
        ([[0], [1], [0]], r"node \[0\] is listed twice"),
        ([[0], [-1]], r"node \[-1\] is not a list of ranks"),
        ([[0], [True]], "not a list of ranks"),
        ([[0], [1.0]], "not a list of ranks"),
        ([[0], ["1"]], "not a list of ranks"),
        ([[0], [None]], "not a list of ranks"),
        ([[[0]]], "not a list of ranks"),
    ],
)
def test_paths_that_make_no_tree_are_refused(
    paths: list[list[int]], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"tree test: .*{complaint}"):
        Tree.of(paths, "test")
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(paths))
    with pytest.raises(UserError, match=complaint) as refusal:
        named_tree(str(file))
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[0], [1]", "cannot read the tree file"),
        ("", "cannot read the tree file"),
        ("\xff", "cannot read the tree file"),
        ('{"paths": [[0]]}', "must hold a list of paths"),
        ("[0, 1]", "must hold a list of paths"),
        ("7", "must hold a list of paths"),
    ],
)
def test_a_file_that_is_no_tree_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=complaint) as refusal:
        named_tree(str(file))
    assert "\n" not in str(refusal.value)


def test_a_tree_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text("[[0], [1], [0, 0]]")
    assert named_tree(str(file)) == Tree.of([[0], [1], [0, 0]], str(file))


def test_named_trees() -> None:
    assert len(paper_trees()) == 9
    for name, paths in paper_trees().items():
        tree = named_tree(name)
        assert (len(tree), tree.origin) == (64, name)
        assert set(tree.paths) == {tuple(path) for path in paths} | {()}
    assert named_tree("chain-3").paths == ((), (0,), (0, 0), (0, 0, 0)) == chain(3).paths
    for name in ("chain-0", "chain-", "chain-x", "mc_sim", "no/such/file.json", ".", "chain--1"):
        with pytest.raises(UserError, match="unknown tree"):
            named_tree(name)


def test_pruning_to_heads_and_width() -> None:
    tree = Tree.of([[0], [1], [5], [0, 0], [0, 0, 0], [5, 0], [1, 3]], "t")
    assert tree.pruned(3, 6) is tree
    assert tree.pruned(2, 6).paths == ((), (0,), (1,), (5,), (0, 0), (1, 3), (5, 0))
    assert tree.pruned(3, 2).paths == ((), (0,), (1,), (0, 0), (0, 0, 0))
    assert tree.pruned(2, 2).origin == "t"
    for name in paper_trees():
        for heads in (1, 2, 3):
            pruned = named_tree(name).pruned(heads, 10)
            assert pruned.depth == heads
            assert Tree.of(pruned.paths, name) == pruned  # still prefix-closed
