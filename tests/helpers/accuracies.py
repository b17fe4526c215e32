"""Accuracies of heads as hypothesis draws them."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st

from medusa_chat.decoding.trees.accuracy import Accuracy

Top = tuple[tuple[float, ...], ...]

_rows = st.lists(st.floats(0.0, 1.0, width=16), min_size=1, max_size=3).map(
    lambda row: tuple(sorted(row))
)
_tops = st.lists(_rows, min_size=1, max_size=2).map(tuple)


def _with_some_paths(top: Top, seed: int) -> Accuracy:
    """Measure the most frequent of random paths, none more frequent than its prefix."""
    draw = random.Random(seed)
    shares: dict[tuple[int, ...], float] = {(): 1.0}
    for path in every_path(top):
        shares[path] = shares[path[:-1]] * draw.choice((0.0, draw.random()))
    ranked = sorted(every_path(top), key=lambda path: (-shares[path], len(path)))
    return Accuracy(top, {path: shares[path] for path in ranked[: draw.randrange(len(ranked) + 1)]})


accuracies: st.SearchStrategy[Accuracy] = st.one_of(
    _tops.map(Accuracy), st.builds(_with_some_paths, _tops, st.integers(0, 10**6))
)


def every_path(top: Top) -> list[tuple[int, ...]]:
    depths = range(1, len(top) + 1)
    return [
        path
        for depth in depths
        for path in itertools.product(*(range(len(row)) for row in top[:depth]))
    ]
