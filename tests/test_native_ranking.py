"""Children ranked by a bias and by the noise in the library's choice, against the definition."""

from __future__ import annotations

import random
from functools import partial
from math import log
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.native.rows import Line, Noise
from tests.helpers.native_choice import (
    NEVER,
    ROOT,
    Biased,
    Case,
    Law,
    choose,
    chosen,
    drawn,
    every_row,
    plainly,
)
from tests.helpers.native_library import need_library

need_library()


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
    case.lines = [
        line._replace(of_log_p=draw.uniform(0.5, 1.5), of_noise=draw.uniform(0, 1.5))
        for line in case.lines
    ]
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
