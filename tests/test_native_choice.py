"""The library's choice of a step's nodes, against a plain twin and against torch's."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.acceptance import truncate
from medusa_chat.decoding.draft.selection import Selector
from medusa_chat.decoding.noise import gumbel
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.native.rows import ChosenRows, Line, Noise
from tests.helpers.native_choice import Biased, choose
from tests.helpers.native_library import need_library
from tests.helpers.tiny import random_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

need_library()

CPU = torch.device("cpu")
ROOT = 99
NEVER = float("-inf")
single = np.float32


@dataclass
class Case:
    """What a choice is made from."""

    superset: Tree
    nodes: int
    tokens: list[list[int]]
    log_p: list[list[float]]
    lines: list[Line]
    measured: list[float] | None = None
    chain: list[int] = field(default_factory=list)
    chain_log_p: list[float] = field(default_factory=list)

    @property
    def rows(self) -> ChosenRows:
        tree = self.superset
        ranks = [path[-1] if path else 0 for path in tree.paths]
        width = len(self.tokens[0]) if self.tokens else 0
        made = ChosenRows(
            tree.parents, ranks, self.nodes, width, lines=self.lines, measured=self.measured
        )
        made.set(self.chain, self.chain_log_p)
        return made

    def plain_ranking(self, depth: int, _token: int) -> tuple[list[int], list[Any]]:
        return list(range(len(self.tokens[depth]))), [single(x) for x in self.log_p[depth]]


def every_row(case: Case, ranking: Any) -> tuple[dict[int, tuple[Any, int, int]], int]:
    """Score, token and parent of every row, by recursion from the root; and the chain's joint.

    `ranking` gives the children of a node at a depth with a token: candidates in order, and log p
    of each candidate.
    """
    found: dict[int, tuple[Any, int, int]] = {0: (single(0), ROOT, 0)}
    joint = 0

    def grow(row: int, total: float, agrees: bool) -> None:
        nonlocal joint
        depth = case.superset.depths[row]
        children = [
            child for child, parent in enumerate(case.superset.parents) if child and parent == row
        ]
        if agrees:
            joint = row
        for child in children:
            order, log_p = ranking(depth, found[row][1])
            candidate = order[case.superset.paths[child][-1]]
            line, token = case.lines[depth], case.tokens[depth][candidate]
            right = single(line.scale) * log_p[candidate] + single(line.shift)
            if case.measured is not None:
                right = single(case.measured[child])
            right = single(NEVER) if np.isnan(right) else min(single(0), right)
            on = agrees and depth < len(case.chain) and token == case.chain[depth]
            if on:
                right = max(right, single(case.chain_log_p[depth]))
            below = total + float(right)
            found[child] = single(below), token, row
            grow(child, below, on)

    grow(0, 0.0, True)
    total, stem = 0.0, case.superset.depths[joint]
    before, row = found[joint][0], joint
    for depth in range(stem, len(case.chain)):
        total += float(single(case.chain_log_p[depth]))
        before = min(before, single(total) + found[joint][0])
        found[len(case.superset) + depth] = before, case.chain[depth], row
        row = len(case.superset) + depth
    return found, joint


def plainly(case: Case, ranking: Any) -> tuple[list[int], list[int], list[int], int]:
    """Rows, tokens, parents and joint of the n best: the higher score, then the lower row."""
    found, joint = every_row(case, ranking)
    best = sorted(found, key=lambda row: (-found[row][0], row))[: case.nodes]
    rows = sorted(best)
    parents = [rows.index(found[row][2]) for row in rows]
    copied = any(row >= len(case.superset) for row in rows)
    return rows, [found[row][1] for row in rows], parents, joint if copied else 0


def chosen(case: Case, law: Law | None = None) -> tuple[list[int], list[int], list[int], int]:
    rows = case.rows
    more: dict[str, Any] = {}
    if law is not None:
        rows.set(case.chain, case.chain_log_p, law.noise)
        more = {"indices": law.indices, "bias": law.bias}
    assert choose(rows, ROOT, case.tokens, case.log_p, **more) == 0
    return rows.rows, rows.tokens, rows.parents, rows.joint


def drawn(seed: int, ties: bool = False) -> Case:
    """A case with a chain that agrees with a path for a while, or none."""
    draw = random.Random(seed)
    depth, width = draw.randint(1, 5), draw.randint(1, 6)
    superset = random_tree(seed, draw.randint(1, 40), depth, width)
    depth, width = superset.depth, superset.width + draw.randint(0, 3)

    def likely() -> float:
        return draw.choice((0.0, -0.25, -0.5)) if ties else -draw.expovariate(1)

    tokens = [draw.sample(range(20), width) for _ in range(depth)]
    log_p = [sorted((likely() for _ in range(width)), reverse=True) for _ in range(depth)]
    lines = [Line()] * depth if ties else _lines(draw, depth)
    path = draw.choice(superset.paths)
    agreed = [tokens[place][rank] for place, rank in enumerate(path)]
    chain = agreed + [draw.randrange(20) for _ in range(draw.randint(0, 10))]
    chain = chain if draw.random() < 0.8 else []
    nodes = draw.choice([1, len(superset), draw.randint(1, len(superset))])
    measured = None
    if draw.random() < 0.3:
        measured = [0.0, *(likely() for _ in superset.paths[1:])]
    chain_log_p = [likely() - (0 if ties else 1e-3) for _ in chain]
    return Case(superset, nodes, tokens, log_p, lines, measured, chain, chain_log_p)


def _lines(draw: random.Random, depth: int) -> list[Line]:
    return [Line(draw.uniform(0.5, 2), draw.uniform(-1, 1)) for _ in range(depth)]


@given(seed=st.integers(0, 10**6), ties=st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_nodes_are_those_of_a_plain_twin(seed: int, ties: bool) -> None:
    case = drawn(seed, ties)
    assert chosen(case) == plainly(case, case.plain_ranking)


@given(seed=st.integers(0, 10**6), ties=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_nodes_are_those_that_torch_selects(seed: int, ties: bool) -> None:
    case = drawn(seed, ties)
    tree, width = case.superset, len(case.tokens[0])
    selector = Selector(
        tree, case.nodes, len(case.chain), CPU, shape=(len(tree), tree.depth, width)
    )
    scale, shift, _ = torch.tensor(case.lines).unbind(1)
    said = (scale[:, None] * torch.tensor(case.log_p) + shift[:, None]).clamp(max=0)
    along = selector.along_paths(said)
    if case.measured is not None:
        along = torch.zeros(tree.depth, len(tree))
        for row, branch in enumerate(tree.branches):
            for depth, node in enumerate(branch[1:]):
                along[depth, row] = case.measured[node]
    chain = torch.tensor(case.chain, dtype=torch.long), torch.tensor(case.chain_log_p)
    selection = selector.choose(torch.tensor([ROOT]), torch.tensor(case.tokens), along, *chain)
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


# ---- children ranked by a bias and by the noise ----


@dataclass
class Law:
    """What changes the ranking of children: a bias by the parent, the noise, or both."""

    indices: list[list[int]]
    bias: Biased | None
    noise: Noise | None

    def ranking(self, case: Case, depth: int, token: int) -> tuple[list[int], list[Any]]:
        """Rank by the definition, in float64: candidates in order, and log p of each."""
        z = torch.tensor(case.log_p[depth], dtype=torch.float64)
        if self.bias is not None:
            row = token if self.bias.rows is None else self.bias.rows[token]
            rest = max(1 - float(z.exp().sum()), 0.0)
            second = self.bias.second[self.indices[depth]].double()
            biased = z + second @ self.bias.first[row].double()
            z = biased - (biased.exp().sum() + rest).log()
        if self.noise is not None:
            z = self.drawn(z, case.lines[depth].sharpness, depth, case.tokens[depth])
        order = sorted(range(len(z)), key=lambda place: (-float(z[place]), place))
        gaps = [float(z[a] - z[b]) for a, b in pairwise(order) if z[b] > NEVER]
        assume(min(gaps, default=1) > 1e-4)
        return order, [single(value) for value in z.tolist()]

    def drawn(self, z: Tensor, sharpness: float, depth: int, tokens: list[int]) -> Tensor:
        assert self.noise is not None
        seed, position, temperature, *truncation = self.noise
        tempered = (sharpness * z / temperature).float()
        kept = truncate(tempered[None], *truncation)[0].double()
        place = torch.tensor([position + depth + 1])
        scores = kept + gumbel(seed, place, 128)[0, tokens].double()
        drawn: Tensor = scores - scores.logsumexp(-1)
        return drawn


def law_of(seed: int, case: Case, biased: bool, coupled: bool, dtype: Any) -> Law:
    """A law whose bias is over all 128 tokens, or over a vocabulary of its own."""
    draw = random.Random(seed)
    indices, bias, noise = case.tokens, None, None
    if biased:
        generator = torch.Generator().manual_seed(seed)
        rank = draw.choice([1, 5, 16, 33, 64])
        rows = None
        if draw.random() < 0.5:  # token 5 t is number t of 20; all others share row 20
            rows = [token // 5 if token % 5 == 0 and token < 100 else 20 for token in range(128)]
            case.tokens = [[5 * token for token in level] for level in case.tokens]
            case.chain = [5 * token for token in case.chain]
        tables = [
            torch.randn(count, rank, generator=generator) / rank**0.25
            for count in ((128, 128) if rows is None else (21, 20))
        ]
        first, second = (table.to(dtype) for table in tables)
        bias = Biased(first, second, rows)
    if coupled:
        noise = Noise(
            draw.randrange(2**31),
            draw.randrange(5000),
            draw.choice([0.3, 0.7, 1.0, 1.5]),
            draw.choice([0, 0, 1, 2, 5, 200]),
            draw.choice([1.0, 1.0, 0.9, 0.5]),
            draw.choice([0.0, 0.0, 0.05, 0.4]),
        )
    case.lines = [line._replace(sharpness=draw.uniform(0.5, 1.5)) for line in case.lines]
    return Law(indices, bias, noise)


def normal(case: Case) -> None:
    """Make what each head says of its candidates a distribution with a tail."""
    for depth, row in enumerate(case.log_p):
        rest = 0.9 if depth % 2 else 1.0
        sums = torch.tensor(row, dtype=torch.float64).logsumexp(0)
        case.log_p[depth] = [value - float(sums) + log(rest) for value in row]


@pytest.mark.parametrize(("biased", "coupled"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_children_are_ranked_as_defined(seed: int, biased: bool, coupled: bool, dtype: Any) -> None:
    case = drawn(seed)
    normal(case)
    law = law_of(seed, case, biased, coupled, dtype)
    ranking = partial(law.ranking, case)
    found, _ = every_row(case, ranking)
    scores = sorted((float(score) for score, _, _ in found.values()), reverse=True)
    edge = scores[case.nodes - 1 : case.nodes + 1]
    assume(len(edge) < 2 or edge[0] == edge[1] == NEVER or edge[0] - edge[1] > 1e-4)
    expected = plainly(case, ranking)
    assert chosen(case, law) == expected


def test_the_bias_of_a_token_that_the_heads_do_not_rank() -> None:
    """A root outside the vocabulary takes the last row of `first`."""
    first, second = torch.eye(3), 9 * torch.eye(3)[:2]
    rows = [2] * 128
    rows[10], rows[20] = 0, 1
    tree = Tree.of([(0,), (0, 0)])
    for root, expected in ((ROOT, [10, 10]), (10, [10, 10]), (20, [20, 20])):
        case = Case(tree, 3, [[10, 20]] * 2, [[-0.6, -0.8]] * 2, [Line()] * 2)
        made = case.rows
        bias = Biased(first, second, rows)
        indices = [[0, 1]] * 2
        assert choose(made, root, case.tokens, case.log_p, indices=indices, bias=bias) == 0
        assert made.tokens[1:] == expected


@pytest.mark.parametrize(
    "noise",
    [
        Noise(1, 2, 0.0),
        Noise(1, 2, -1.0),
        Noise(1, 2, float("nan")),
        Noise(1, 2, float("inf")),
        Noise(1, 2, 1.0, -1),
        Noise(1, 2, 1.0, 0, float("nan")),
        Noise(1, 2, 1.0, 0, 1.0, float("nan")),
    ],
)
def test_noise_out_of_range_is_refused(noise: Noise) -> None:
    case = Case(Tree.of([(0,)]), 2, [[1, 2]], [[-0.6, -0.8]], [Line()])
    rows = case.rows
    rows.set(noise=noise)
    assert choose(rows, 1, case.tokens, case.log_p) == -1


@pytest.mark.parametrize("which", ["index", "row", "rank", "tokens"])
def test_a_bias_out_of_range_is_refused(which: str) -> None:
    case = Case(Tree.of([(0,)]), 2, [[1, 2]], [[-0.6, -0.8]], [Line()])
    rank = 1025 if which == "rank" else 4
    rows = [0] * 128
    rows[2] = 3 if which == "row" else 2
    bias = Biased(torch.zeros(3, rank), torch.zeros(2, rank), rows)
    indices = [[0, 2 if which == "index" else 1]]
    tokens = [[1, 128]] if which == "tokens" else case.tokens
    assert choose(case.rows, 1, tokens, case.log_p, indices=indices, bias=bias) == -1
