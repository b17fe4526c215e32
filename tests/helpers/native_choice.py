"""Choices of nodes by the library alone, over candidates that a test makes up; a plain twin."""

from __future__ import annotations

import random
from ctypes import addressof, byref, c_float, c_int32
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import assume

from medusa_chat.decoding.acceptance import truncate
from medusa_chat.decoding.noise import gumbel
from medusa_chat.native.library import load
from medusa_chat.native.rows import ChosenRows, Line, Noise
from medusa_chat.native.structures import BFLOAT16, FLOAT32, Bias, Candidates
from tests.helpers.tiny import random_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from medusa_chat.decoding.trees.tree import Tree


ROOT = 99
NEVER = float("-inf")


@dataclass
class Biased:
    """A bias: first [P, rank], second [N, rank], and the row of `first` of each token."""

    first: torch.Tensor
    second: torch.Tensor
    rows: Sequence[int] | None = None

    def structure(self) -> Bias:
        """What the library reads; this object has to live as long."""
        assert self.first.dtype == self.second.dtype
        number = FLOAT32 if self.first.dtype == torch.float32 else BFLOAT16
        self._rows = None if self.rows is None else (c_int32 * len(self.rows))(*self.rows)
        return Bias(
            self.first.shape[1],
            number,
            len(self.first),
            len(self.second),
            self.first.data_ptr(),
            self.second.data_ptr(),
            None if self._rows is None else addressof(self._rows),
        )


def choose(
    rows: ChosenRows,
    root: int,
    tokens: Sequence[Sequence[int]],
    log_p: Sequence[Sequence[float]],
    vocabulary: int = 128,
    *,
    indices: Sequence[Sequence[int]] | None = None,
    bias: Biased | None = None,
) -> int:
    """Choose among tokens [heads, ranked] with log p [heads, ranked]; returns mc_choose's result.

    `indices` are those of the tokens among the ones that the heads rank, by default the tokens.
    """
    flat = [token for row in tokens for token in row]
    ids = flat if indices is None else [index for row in indices for index in row]
    arrays: Any = (
        (c_int32 * len(flat))(*flat),
        (c_int32 * len(ids))(*ids),
        (c_float * len(flat))(*(value for row in log_p for value in row)),
    )
    structure = None if bias is None else bias.structure()
    candidates = Candidates(
        len(tokens),
        rows.ranked,
        vocabulary,
        *map(addressof, arrays),
        None if structure is None else addressof(structure),
    )
    return int(load().mc_choose(byref(rows.choice), byref(candidates), root))


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
        # Sums of these are equal or not by their last places.
        return draw.choice((0.0, -0.1, -0.2, -0.3, -0.7)) if ties else -draw.expovariate(1)

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
            z = self.drawn(z, case.lines[depth], depth, case.tokens[depth])
        order = sorted(range(len(z)), key=lambda place: (-float(z[place]), place))
        gaps = [float(z[a] - z[b]) for a, b in pairwise(order) if z[b] > NEVER]
        assume(min(gaps, default=1) > 1e-4)
        return order, [single(value) for value in z.tolist()]

    def drawn(self, z: Tensor, line: Line, depth: int, tokens: list[int]) -> Tensor:
        assert self.noise is not None
        seed, position, temperature, *truncation = self.noise
        tempered = (line.of_log_p * z / temperature).float()
        kept = truncate(tempered[None], *truncation)[0].double()
        place = torch.tensor([position + depth + 1])
        scores = kept + line.of_noise * gumbel(seed, place, 128)[0, tokens].double()
        drawn: Tensor = scores - scores.logsumexp(-1)
        return drawn
