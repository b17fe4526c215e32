"""The library's choice of a step's nodes, against a plain twin and against torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.draft.selection import Selector
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.native.rows import ChosenRows, Line
from tests.helpers.native_choice import NEVER, ROOT, Case, choose, chosen, drawn, plainly
from tests.helpers.native_library import need_library

if TYPE_CHECKING:
    from collections.abc import Callable


need_library()

CPU = torch.device("cpu")


@given(seed=st.integers(0, 10**6), ties=st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_nodes_are_those_of_a_plain_twin(seed: int, ties: bool) -> None:
    case = drawn(seed, ties)
    assert chosen(case) == plainly(case, case.plain_ranking)


@given(seed=st.integers(0, 10**6), ties=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_nodes_are_those_that_torch_selects(seed: int, ties: bool) -> None:
    case = drawn(seed, ties)
    tree = case.superset
    selector = Selector(tree, case.nodes, len(case.chain), CPU)
    scale, shift, *_ = torch.tensor(case.lines).unbind(1)
    said = (scale[:, None] * torch.tensor(case.log_p) + shift[:, None]).clamp(max=0)
    places = [(len(path) - 1, path[-1]) for path in tree.paths[1:]]
    guesses = [case.tokens[depth][rank] for depth, rank in places]
    log_p = torch.tensor([0.0, *(float(said[place]) for place in places)])
    if case.measured is not None:
        log_p = torch.tensor(case.measured)
    chain = torch.tensor(case.chain, dtype=torch.long), torch.tensor(case.chain_log_p)
    selection = selector.choose(torch.tensor([ROOT, *guesses]), log_p, *chain)
    rows, tokens, parents, joint = chosen(case)
    assert rows == selection.rows.tolist()
    assert tokens == selection.candidates.tolist()
    assert parents == selection.tensors.parents.tolist()
    if rows[-1] >= len(tree):
        assert joint == int(selection.joint)


def test_copies_alone() -> None:
    for length in (1, 10, 64):
        for nodes in (1, 2, length, length + 1):
            chain = list(range(length))
            case = Case(Tree(), nodes, [], [], [], None, chain, [-0.5] * length)
            count = min(nodes, length + 1)
            rows = list(range(count))
            expected = rows, [ROOT, *chain][:count], [0, *rows[:-1]], 0
            assert (chosen(case)) == expected
            if nodes > length + 1:
                break


def test_rounding_puts_no_child_before_its_parent() -> None:
    """Steps that are nearly certain change a float32 sum by nothing at all."""
    superset = Tree.of([(0,) * n for n in range(1, 9)] + [(1,), (1, 0)])
    log_p = [[-1e-8, -9.0], *[[-1e-8, -1e-8]] * 7]
    for nodes in range(1, len(superset) + 1):
        for shared in range(9):
            chain = [2] * shared + [3] * (12 - shared)
            lines = [Line()] * 8
            case = Case(
                superset, nodes, [[2, 1]] * 8, log_p, lines, None, chain, [-1e-8] * len(chain)
            )
            assert chosen(case) == plainly(case, case.plain_ranking)


def test_scores_that_are_no_numbers_come_last() -> None:
    superset = Tree.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])
    for bad in (float("nan"), NEVER):
        log_p = [[-0.1, bad, -0.5], [bad, -0.2, -0.3]]
        lines = [Line(1.5, 0.2)] * 2
        for nodes in range(1, 8):
            case = Case(superset, nodes, [[1, 2, 3]] * 2, log_p, lines)
            assert chosen(case) == plainly(case, case.plain_ranking)
            assert len(chosen(case)[0]) == nodes


REFUSED: dict[str, Callable[[Any], Any]] = {
    "a parent below": lambda case: case.update(parents=[0, 2, 1]),
    "parents that fall": lambda case: case.update(parents=[0, 0, 1, 0]),
    "a parent that is itself": lambda case: case.update(parents=[0, 1]),
    "a negative parent": lambda case: case.update(parents=[0, -1]),
    "a rank too high": lambda case: case.update(ranks=[0, 3, 0]),
    "a negative rank": lambda case: case.update(ranks=[0, -1, 0]),
    "a rank twice": lambda case: case.update(parents=[0, 0, 0], ranks=[0, 1, 1]),
    "too deep": lambda case: case.update(parents=[0, 0, 1, 2], ranks=[0] * 4),
    "no node": lambda case: case.update(size=0),
    "more nodes than paths": lambda case: case.update(size=4),
    "a copied token too high": lambda case: case.update(chain=[128], chain_log_p=[-1.0]),
    "a negative copied token": lambda case: case.update(chain=[-1], chain_log_p=[-1.0]),
    "a copied token surer than sure": lambda case: case.update(chain=[1], chain_log_p=[0.1]),
    "a copy of unknown chance": lambda case: case.update(chain=[1], chain_log_p=[float("nan")]),
    "a calibration that is no number": lambda case: case.update(lines=[Line(float("nan"))]),
    "a shift without end": lambda case: case.update(lines=[Line(1.0, float("inf"))]),
    "a measure that is no number": lambda case: case.update(measured=[0, float("nan"), 0]),
    "a root too high": lambda case: case.update(root=128),
    "a negative root": lambda case: case.update(root=-1),
    "a guess too high": lambda case: case.update(tokens=[[1, 128, 3]] * 2),
    "a negative guess": lambda case: case.update(tokens=[[1, -1, 3]] * 2),
}


@pytest.mark.parametrize("why", [None, *REFUSED])
def test_what_is_out_of_range_is_refused(why: str | None) -> None:
    case: dict[str, Any] = {
        "parents": [0, 0, 1],
        "ranks": [0, 2, 0],
        "size": 3,
        "lines": [],
        "measured": None,
        "chain": [],
        "chain_log_p": [],
        "root": 0,
        "tokens": [[1, 2, 3]] * 2,
    }
    if why:
        REFUSED[why](case)
    if len(case["ranks"]) != len(case["parents"]):
        case["ranks"] = [0] * len(case["parents"])
    rows = ChosenRows(
        case["parents"],
        case["ranks"],
        case["size"],
        3,
        lines=case["lines"],
        measured=case["measured"],
    )
    rows.set(case["chain"], case["chain_log_p"])
    rows.choice.joint = 77
    result = choose(rows, case["root"], case["tokens"], [[-1.0] * 3] * 2)
    assert result == (-1 if why else 0)
    assert (rows.joint == 77) == bool(why)
