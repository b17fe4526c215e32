"""Fast steps and their slow twins, and bench on a GPU."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from torch import nn

from medusa_chat.bench import bandwidth, measure, twin
from medusa_chat.bench.host import host_gaps
from medusa_chat.bench.random_engine import RandomModel, random_engine
from medusa_chat.cli import main
from medusa_chat.config import LoadOptions
from medusa_chat.decoding import fast
from medusa_chat.decoding.graphs.capture import not_recorded
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees import costs
from medusa_chat.sampling import Sampling
from medusa_chat.shapes import SHAPES, Shape
from medusa_chat.terminal.reports import bench as bench_report
from tests.helpers.tiny import (
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.decoding.report import StepReport

CPU = torch.device("cpu")
TINY = Shape(2, 64, 128, 4, 2, 512, tied=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "REPEATS", 1)
    monkeypatch.setattr(bandwidth, "BUFFER", 2**20)
    monkeypatch.setitem(SHAPES, "tiny", TINY)


class TwoSteps(Runner):
    """A runner whose fast step is the eager one, or a wrong one."""

    wrong = False

    def __init__(self, *arguments: Any, eager: bool = False) -> None:
        super().__init__(*arguments)
        self.slow = eager

    def launch(self, *arguments: Any) -> Callable[[], StepReport]:
        finish = super().launch(*arguments)
        return finish if self.slow or not self.wrong else lambda: spoiled(finish())


def spoiled(outcome: StepReport) -> StepReport:
    return replace(outcome, next=(outcome.next + 1) % 64)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_captured_step_is_compared_with_the_eager_one(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "Runner", TwoSteps)
    monkeypatch.setattr(TwoSteps, "wrong", wrong)
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone))
    engine.runner = fast = TwoSteps(backbone, random_heads(backbone), 512)
    tree = engine.trees.current
    found = twin.compare_with_eager(engine, [prompt_ids(9), prompt_ids(5)])
    assert set(found) == {"greedy", "typical", "exact", "vanilla"}
    for check in found.values():
        assert (check["replies"], check["equal"]) == (2, 0 if wrong else 2)
        assert (check["agreed"] == 1) is not wrong
        assert check["tokens_per_second"] > 0
    assert engine.runner is fast
    assert engine.trees.current is tree


def test_agreement_ends_at_the_first_difference_of_a_reply() -> None:
    ours, theirs = [[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]
    assert twin.agreement(ours, theirs) == {"replies": 2, "equal": 1, "agreed": 0.6667}
    assert twin.agreement([[1, 2]], [[1]]) == {"replies": 1, "equal": 0, "agreed": 0.5}


def test_a_comparison_uses_one_fixed_tree() -> None:
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone), "chain-2")
    policy, tree = engine.trees.policy, engine.trees.current
    with twin.same_tree(engine):
        assert engine.trees.current.origin == twin.TREE
        assert len(engine.trees.current) == 32
    assert (engine.trees.policy, engine.trees.current) == (policy, tree)


def test_a_device_with_other_replies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load(**changed: Any) -> Any:
        asked.append(changed)
        backbone = random_backbone(seed=2 if "device" in changed else wrong)
        return make_engine(backbone, random_heads(backbone), changed["tree"])

    monkeypatch.setattr(twin, "TOKENS", 12)
    for wrong in (2, 3):
        found = twin.compare_in_float32(load, [prompt_ids(9), prompt_ids(5)])
        for mode in ("greedy", "typical", "exact", "vanilla"):
            assert (found["cpu"][mode]["equal"] == 2) is (wrong == 2)
            assert found["eager"][mode]["equal"] == 2
    assert [each["dtype"] for each in asked] == ["float32"] * 4
    assert [each.get("device") for each in asked] == [None, "cpu"] * 2


def test_waits_for_the_host_are_timed_between_static_steps_only() -> None:
    backbone = random_backbone()
    heads = random_heads(backbone)
    sampling = Sampling(max_new_tokens=20)
    assert host_gaps(make_engine(backbone, heads, eager=True), prompt_ids(5), sampling) is None
    engine = make_engine(backbone, heads, eager=False)
    found = host_gaps(engine, prompt_ids(5), sampling)
    steps = [step for step in decode(engine, prompt_ids(5), max_new_tokens=20) if step.nodes]
    assert found is not None
    assert found["steps"] == len(steps) - 1
    assert 0 < found["median_ms"] <= found["p90_ms"]
    assert (
        host_gaps(
            engine,
            prompt_ids(5),
            replace(sampling, max_new_tokens=3, mode="vanilla", temperature=0),
        )
        is None
    )


IN_FLOAT32 = LoadOptions(dtype="float32", engine="torch")


def test_a_random_model_with_separate_matrices_gives_the_same_text() -> None:
    joined, apart = (
        random_engine(RandomModel("tiny", fused=fused), 600, CPU, IN_FLOAT32)
        for fused in (True, False)
    )
    layers = [
        sum(isinstance(m, nn.Linear) for m in engine.backbone.model.modules())
        for engine in (joined, apart)
    ]
    assert layers[1] - layers[0] == 3 * TINY.layers
    texts = [
        ids_of(decode(engine, prompt_ids(5, 512), max_new_tokens=8)) for engine in (joined, apart)
    ]
    assert texts[0] == texts[1]


def test_one_call_measures_everything_on_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU taken for a GPU, every section is in the JSON and in the tables."""
    monkeypatch.setattr(measure, "is_gpu", lambda _: True)
    shapes_of_gpu = (RandomModel("tiny"), RandomModel("tiny", "nf4"), RandomModel("llama-70b"))
    monkeypatch.setattr(measure, "SHAPES_OF_GPU", shapes_of_gpu)
    monkeypatch.setitem(SHAPES, "llama-70b", replace(SHAPES["vicuna-7b"], layers=800))
    monkeypatch.setattr(fast, "capturable", lambda *_: True)
    monkeypatch.setattr(fast, "CudaGraphs", lambda _: not_recorded)
    monkeypatch.setattr(twin, "TOKENS", 6)
    words = "bench --device cpu --engine torch --tree chain-2 --limit 2 --rounds 1 --modes greedy"
    words += " --max-new-tokens 6 --context 16"
    assert main(words.split()) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    printed, text = json.loads(last), "\n".join(lines)
    for mode in ("greedy", "typical", "exact", "vanilla"):
        assert printed["float32"]["cpu"][mode]["equal"] == 2
        assert printed["float32"]["eager"][mode]["equal"] == 2
    for figures in (printed, *printed["shapes"].values()):
        assert set(figures["host"]) == {"vanilla", "greedy"}
        assert set(figures["eager"]) == {"greedy", "typical", "exact", "vanilla"}
        assert figures["limit"]["gb_per_second"] > 0
    assert list(printed["shapes"]) == ["tiny", "tiny:nf4"]
    (step,), (apart,) = (printed["shapes"]["tiny:nf4"][key] for key in ("steps", "apart"))
    assert set(step["nodes"]) == set(apart["nodes"]) >= {"4", "8", "16", "32", "64"}
    assert "apart" not in printed["shapes"]["tiny"]
    assert "llama-70b takes" in printed["left_out_shapes"]["llama-70b"]
    assert "llama-70b was left out" in text
    for part in ("as on the CPU", "as eager ones", "wait for the host", "joined, and apart"):
        assert part in text
    assert printed["seconds"] > 0


def test_what_was_measured_before_an_interrupt_is_kept_and_a_part_can_be_measured_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    parts = {
        "small": lambda *_: {"shapes": {"small": {}}},
        "large": lambda *_: {"shapes": {"large": {}}, "left_out_shapes": {"huge": "too large"}},
        "replies": interrupted,
    }
    monkeypatch.setattr(measure, "parts_of", lambda *_: parts)
    file = tmp_path / "found.json"
    assert main(["bench", "--json", str(file)]) == 130
    assert f"{file} holds the parts before" in capsys.readouterr().err
    kept = json.loads(file.read_text())
    assert kept["shapes"] == {"small": {}, "large": {}}
    assert kept["left_out_shapes"] == {"huge": "too large"}
    assert main(["bench", "--part", "replies"]) == 130
    assert "no result" in capsys.readouterr().err
    assert main(["bench", "--part", "medium"]) == 2
    assert "the parts of this bench are small, large, replies" in capsys.readouterr().err


def test_the_comparison_of_captured_steps_is_printed() -> None:
    rates = {"tokens_per_second": 300.0, "eager_tokens_per_second": 100.0}
    check = {"replies": 4, "equal": 3, "agreed": 0.8} | rates
    console = Console(width=80, file=io.StringIO())
    host = {"greedy": {"steps": 9, "median_ms": 0.1234, "p90_ms": 0.2}}
    figures = {
        "steps": [],
        "parts": {},
        "eager": {"greedy": check},
        "host": host,
        "notices": ["steps cannot be recorded"],
        "peak_memory_bytes": {"host": 2**30},
    }
    shape = {"own": True, "heads": 4, "dtype": "float32", **figures}
    result = {"modes": {}, "device": "a GPU", "shapes": {"tiny": shape}}
    bench_report.show_bench(result, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    (row,) = (line for line in printed.splitlines() if "greedy" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["greedy", "3 of 4, 80%", "300.0", "100.0", "0.123 ms"]
    assert "steps cannot be recorded" in printed
    assert "1.00 GiB on the host" in printed
