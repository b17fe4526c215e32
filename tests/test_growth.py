"""Growing trees: against brute force, by hand, and from the file of accuracies."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.config import UserError
from medusa_chat.decoding.trees import costs
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy, read_accuracy, write_accuracy
from medusa_chat.decoding.trees.growth import grow
from medusa_chat.decoding.trees.tree import Tree
from tests.helpers.accuracies import accuracies, every_path
from tests.helpers.tiny import make_engine, random_backbone, random_heads

if TYPE_CHECKING:
    from pathlib import Path


def value(path: tuple[int, ...], accuracy: Accuracy) -> float:
    """Chance that a path is right: as measured; from there on heads are independent."""
    share = 1.0
    for depth in range(1, len(path) + 1):
        if path[:depth] in accuracy.paths:
            share = accuracy.paths[path[:depth]]
            continue
        row, rank = accuracy.top[depth - 1], path[depth - 1]
        share *= row[rank] - (row[rank - 1] if rank else 0.0)
        share = min([share, *accuracy.paths.values()])
    return share


def best_by_brute_force(accuracy: Accuracy, nodes: int) -> float:
    """Forecast of the best of all prefix-closed sets of `nodes` nodes, root included."""
    paths = every_path(accuracy.top)
    forecasts = [
        1 + sum(value(path, accuracy) for path in chosen)
        for chosen in itertools.combinations(paths, min(nodes - 1, len(paths)))
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    ]
    return max(forecasts)


@given(accuracy=accuracies, nodes=st.integers(1, 6))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_growth_finds_the_best_tree(accuracy: Accuracy, nodes: int) -> None:
    tree, forecast = grow(accuracy, nodes)
    assert len(tree) == len(forecast) <= nodes
    assert forecast[-1] == pytest.approx(best_by_brute_force(accuracy, nodes))
    assert forecast == sorted(forecast)
    assert accuracy.forecast(tree) == pytest.approx(forecast[-1])
    for stage in range(1, len(tree) + 1):
        smaller = grow(accuracy, stage)[0]
        assert set(smaller.paths) <= set(tree.paths)
        assert forecast[stage - 1] == pytest.approx(
            1 + sum(value(path, accuracy) for path in smaller.paths[1:])
        )


def test_growth_by_hand() -> None:
    """A plateau (the second guess was never right) must not hide the third guess."""
    tree, forecast = grow(Accuracy(((0.5, 0.5, 0.75), (0.4,))), 5)
    assert set(tree.paths) == {(), (0,), (2,), (0, 0), (2, 0)}
    assert forecast == pytest.approx([1.0, 1.5, 1.75, 1.95, 2.05])
    published, lengths = grow(PUBLISHED, 64)
    assert len(published) == 64
    # Third parties measure 2.31 to 2.39 with these heads.
    assert lengths[-1] == pytest.approx(2.35, abs=0.1)


# ---- the file of accuracies ----


def test_accuracies_are_read_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "head_accuracy.json"
    assert read_accuracy(file) is None
    file.write_text(json.dumps({"accuracy": [[0.5, 0.6], [0.25, 1]], "extra": 1}))
    # Older versions wrote no paths.
    assert read_accuracy(file) == Accuracy(((0.5, 0.6), (0.25, 1.0)))
    accuracy = Accuracy(((0.5, 0.6), (0.25, 1 / 3)), {(0,): 0.48, (1,): 0.1, (0, 1): 0.1})
    write_accuracy(accuracy, file, "test")
    assert read_accuracy(file) == Accuracy(((0.5, 0.6), (0.25, 0.33333)), accuracy.paths)
    weights = ((0.9, 0.4), (1.0, 0.0))
    both = Accuracy(((0.5,), (0.4,)), exact=Accuracy(((0.3,), (0.2,)), coupling=weights))
    write_accuracy(both, file, "test")
    assert read_accuracy(file) == both
    assert [each.name for each in tmp_path.iterdir()] == ["head_accuracy.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"accuracy": []}',
        '{"accuracy": [[]]}',
        '{"accuracy": [[0.5, 0.4]]}',
        '{"accuracy": [[1.5]]}',
        '{"accuracy": [[-0.5]]}',
        '{"accuracy": [["x"]]}',
        '{"accuracy": 3}',
        '{"accuracy": [[NaN]]}',
        '{"accuracy": [[0.1, NaN, 0.2]]}',
        '{"accuracy": [[1' + "0" * 400 + "]]}",
        "[" * 10**5,
        *(
            f'{{"accuracy": [[0.5, 0.6]], "paths": {paths}}}'
            for paths in (
                "null",
                "3",
                "[3]",
                "[[0]]",
                "[[[], 0.5]]",
                "[[[2], 0.5]]",
                "[[[-1], 0.5]]",
                "[[[0, 0], 0.5]]",
                "[[[0], 1.5]]",
                "[[[0], NaN]]",
                '[["0", 0.5]]',
                "[[[0.0], 0.5]]",
                "[[[true], 0.5]]",
                '[[[0], "x"]]',
            )
        ),
        '{"accuracy": [[0.5], [0.5]], "paths": [[[0], 0.3], [[0, 0], 0.4]]}',
        '{"accuracy": [[0.5], [0.5]], "paths": [[[0, 0], 0.4]]}',
    ],
)
def test_a_broken_file_of_accuracies_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "head_accuracy.json"
    file.write_text(text)
    with pytest.raises(UserError, match="calibrate") as refusal:
        read_accuracy(file)
    assert "\n" not in str(refusal.value)


def test_a_tree_of_the_root_alone_is_vanilla() -> None:
    assert grow(Accuracy(((0.5,),)), 1) == (Tree.of([], "auto"), [1.0])


# ---- paths that were measured together ----


def test_measured_paths_come_before_the_product() -> None:
    """The heads are right together: (0, 0) is better than the product says, (1, 0) worse."""
    top = ((0.5, 0.8), (0.4, 0.5))
    accuracy = Accuracy(top, {(0,): 0.5, (0, 0): 0.4, (1,): 0.3, (1, 0): 0.01})
    tree, forecast = grow(accuracy, 4)
    assert tree.paths == ((), (0,), (1,), (0, 0))
    assert forecast == pytest.approx([1.0, 1.5, 1.9, 2.2])
    # (0, 1) and (1, 1) were not measured: at most as frequent as the rarest that was.
    assert accuracy.frequency((0, 1)) == 0.01
    assert Accuracy(top, {(0,): 0.5}).frequency((0, 0)) == pytest.approx(0.5 * 0.4)
    # The other paths were not ranked.
    assert accuracy.forecast(Tree.of([(0,), (7,), (0, 0), (0, 0, 0)])) == pytest.approx(1.9)
    fewer = accuracy.pruned(1, 1)
    assert (fewer.top, fewer.paths) == (((0.5,),), {(0,): 0.5})


def test_a_tree_by_name_has_a_forecast_if_the_heads_are_calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "REPEATS", 1)
    backbone = random_backbone()
    accuracy = Accuracy(((0.5, 0.8), (0.4, 0.5)), {(0,): 0.5, (0, 0): 0.4})
    engine = make_engine(backbone, random_heads(backbone, 2), "chain-2", accuracy=accuracy)
    expected = "chain of 2: 3 nodes, depth 2; expected 1.9 tokens per step"
    assert engine.trees.describe() == expected
    engine.trees.use("auto")
    forecast = accuracy.forecast(engine.trees.current)
    assert f"calibrated accuracies; expected {forecast:.1f} tokens per" in engine.trees.describe()
