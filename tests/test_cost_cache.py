"""Step costs on disk: measured once, and anew if anything differs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

import medusa_chat
from medusa_chat.cli import make_parser
from medusa_chat.commands.flags import read_fields
from medusa_chat.config import LoadOptions
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees import costs
from medusa_chat.decoding.trees.accuracy import PUBLISHED
from medusa_chat.decoding.trees.choice import StepCost
from medusa_chat.decoding.trees.costs import cached, cost_key
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.layouts import write_heads
from tests.helpers.tiny import (
    OracleHeads,
    make_engine,
    random_backbone,
    random_heads,
    random_model,
    save_model,
)

if TYPE_CHECKING:
    from medusa_chat.model.heads import Heads

KEY = {"device": "abacus", "positions": 256}
COST, OTHER = StepCost(1.0, {2: 1.5, 8: 2.5}), StepCost(3.0, {4: 4.0})


def never() -> StepCost:
    raise AssertionError("measured although it is known")


def test_costs_are_kept_under_their_key(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "when needed"
    assert cached(folder, KEY, lambda: COST) == COST
    assert cached(folder, KEY, never) == COST
    assert cached(folder, KEY | {"positions": 12}, lambda: OTHER) == OTHER
    assert cached(folder, KEY, never) == COST
    assert cached(folder, KEY, lambda: OTHER, anew=True) == OTHER
    assert cached(folder, KEY, never) == OTHER
    assert len(list(folder.iterdir())) == 2
    assert cached(None, KEY, lambda: COST) == COST


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"vanilla": 1}',
        "[" * 10**5,
        "\x00",
        {"vanilla": 0},
        {"vanilla": -1.0},
        {"vanilla": "x"},
        {"vanilla": float("nan")},
        {"vanilla": None},
        {"by_nodes": []},
        {"by_nodes": [[1, 1.0]]},
        {"by_nodes": [[2, 0.0]]},
        {"by_nodes": [[2, 1.0], [4]]},
        {"by_nodes": {"2": 1.0}},
        {"by_nodes": 3},
        {"by_nodes": [[2, float("inf")]]},
        {"key": {"device": "another"}},
    ],
)
def test_a_damaged_file_is_measured_anew_and_mended(
    damage: str | dict[str, Any], tmp_path: Path
) -> None:
    cached(tmp_path, KEY, lambda: COST)
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(damage if isinstance(damage, str) else json.dumps(whole | damage))
    assert cached(tmp_path, KEY, lambda: OTHER) == OTHER
    assert cached(tmp_path, KEY, never) == OTHER


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cached(blocked, KEY, lambda: COST) == COST
    assert cached(blocked / "below", KEY, lambda: COST) == COST

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cached(tmp_path / "full", KEY, lambda: COST) == COST
    assert list((tmp_path / "full").iterdir()) == []


def test_an_interrupt_while_measuring_keeps_nothing(tmp_path: Path) -> None:
    def interrupted() -> StepCost:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, KEY, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_the_key_tells_what_the_cost_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = random_backbone()
    heads = random_heads(backbone)

    def key(
        backbone: Backbone = backbone,
        heads: object = heads,
        capacity: int = 512,
        model: str = "m",
        forecast: float = 2.34,
    ) -> dict[str, Any]:
        return cost_key(Runner(backbone, cast("Heads", heads), capacity), model, forecast)

    same = key()
    # Weights' values do not matter.
    assert same == key(random_backbone(seed=7), random_heads(backbone, seed=5), forecast=2.3)
    assert json.loads(json.dumps(same)) == same
    others = [
        key(model="n"),
        key(forecast=2.5),
        key(random_backbone(vocabulary=65)),
        key(random_backbone("qwen2")),
        key(Backbone(random_model().bfloat16())),
        key(heads=random_heads(backbone, 3)),
        key(capacity=300),
        key(heads=random_heads(backbone, own=False)),
        key(heads=OracleHeads(4, 64, [])),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    others.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(costs, "versions", lambda: {"torch": "0"})
    others.append(key())
    texts = [json.dumps(each, sort_keys=True) for each in (same, *others)]
    assert len(set(texts)) == len(texts)


def test_a_second_engine_need_not_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(*_: object, **__: object) -> StepCost:
        calls.append(1)
        return StepCost(1.0, {2: 1.1, 8: 1.2})

    monkeypatch.setattr(costs, "measure", measured)
    backbone = random_backbone()
    for _ in range(2):
        engine = make_engine(
            backbone, random_heads(backbone), "auto", accuracy=PUBLISHED, costs=tmp_path
        )
        assert len(engine.trees.current) == 8
        assert len(calls) == 1
    engine.trees.use("chain-2")
    engine.trees.use("auto")
    assert len(calls) == 1
    engine.trees.use("retune")
    assert len(calls) == 2
    assert "auto: static, 8 nodes" in engine.trees.describe()
    make_engine(backbone, random_heads(backbone), "retune", accuracy=PUBLISHED, costs=tmp_path)
    assert len(calls) == 3


def test_costs_with_copies_are_not_those_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measured(*_: object, copied: object, **__: object) -> StepCost:
        seen.append(copied is not None)
        return StepCost(1.0, {2: 1.1, 8: 1.2 if copied else 9.0})

    monkeypatch.setattr(costs, "measure", measured)
    backbone = random_backbone()
    heads = random_heads(backbone)
    for _ in range(2):  # the second engine reads both from the disk
        engine = make_engine(backbone, heads, "auto", copies=True, costs=tmp_path)
        assert len(engine.trees.current) == 8
        engine.trees.use_copies(False)
        assert not engine.trees.copies
        assert len(engine.trees.current) < 8
        engine.trees.use_copies(True)
        assert len(engine.trees.current) == 8
        assert seen == [True, False]
    engine.trees.use("chain-2")
    engine.trees.use_copies(False)  # a named tree stays
    assert engine.trees.current.origin == "chain of 2"


def test_load_keeps_costs_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "measure", lambda *_, **__: StepCost(1.0, {2: 1.1, 8: 1.2}))
    folder = save_model(tmp_path / "model", random_model(vocabulary=260))
    write_heads(random_heads(random_backbone(vocabulary=260), 2), folder)
    medusa_chat.load(str(folder))
    (file,) = (tmp_path / "cache").rglob("*.json")
    assert file.parent == Path(tmp_path / "cache" / "medusa-chat" / "step-costs")
    monkeypatch.setattr(costs, "measure", lambda *_, **__: never())
    medusa_chat.load(str(folder))
    with pytest.raises(AssertionError, match="although"):
        medusa_chat.load(str(folder), tree="retune")


def test_retune_is_a_flag_of_its_own() -> None:
    retune = make_parser().parse_args(["chat", "--retune"])
    assert read_fields(retune, LoadOptions).tree == "retune"
    plain = make_parser().parse_args(["bench", "--prompts", "x"])
    assert read_fields(plain, LoadOptions).tree == "auto"
