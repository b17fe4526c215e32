"""bench's measures of the machine: bytes of a step, the limit, random shapes, second turns, twins of a fast step, and
the whole story of a GPU."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from torch import nn

from medusa_chat.bench import bandwidth, history, measure, shapes, twin
from medusa_chat.bench.bandwidth import backbone_bytes, measure_limit, resident_bytes, step_bytes
from medusa_chat.bench.host import host_gaps
from medusa_chat.bench.plan import RandomModel
from medusa_chat.bench.shapes import numbers, parse_shapes, random_engine
from medusa_chat.bench.steps import measure_steps, reached
from medusa_chat.cli import main
from medusa_chat.config import Quant, Sampling, UserError
from medusa_chat.decoding import runner as runner_module
from medusa_chat.decoding.graphs.capture import as_it_is
from medusa_chat.decoding.runner import Outcome, Runner
from medusa_chat.decoding.trees import choice as tuning
from medusa_chat.hub.model_list import packaged_file, read_models
from medusa_chat.machine import memory
from medusa_chat.machine.devices import (
    free_memory,
    last_level_cache,
    peak_memory,
    reset_peak_memory,
)
from medusa_chat.model.heads import decoding_heads
from medusa_chat.model.linear.packed import PackedLinear, pack_linear
from medusa_chat.model.linear.quantization import quantize_linear
from medusa_chat.shapes import SHAPES, Shape
from medusa_chat.terminal.reports import bench as bench_report
from tests.helpers.quiet import quiet
from tests.helpers.tiny import (
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
)

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
TINY = Shape(2, 64, 128, 4, 2, 512, tied=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "REPEATS", 1)
    monkeypatch.setattr(bandwidth, "BUFFER", 2**20)
    monkeypatch.setitem(SHAPES, "tiny", TINY)


# ---- bytes ----


def test_bytes_are_counted_once_however_many_tensors_share_them() -> None:
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=True)
    assert resident_bytes([first, second]) == 4 * (32 + 32 + 4)
    second.weight = first.weight
    assert resident_bytes([first, second]) == 4 * (32 + 4)
    fused = torch.zeros(6, 8)
    first.weight, second.weight = (
        nn.Parameter(fused[:4]),
        nn.Parameter(fused[2:]),
    )  # views that overlap by two rows
    assert resident_bytes([first, second]) == 4 * (48 + 4)


@pytest.mark.parametrize(
    ("quant", "per_weight"), [("nf4", 0.5 + 4 / 64), ("nf4-double", 0.5 + 1 / 64), ("int8", 1.0)]
)
def test_bytes_of_quantized_layers_are_those_that_lie_in_memory(
    quant: Quant, per_weight: float
) -> None:
    plain = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    layer = quantize_linear(plain, quant, CPU)
    weights = 512 * 256
    assert resident_bytes(layer.modules()) == pytest.approx(weights * per_weight, rel=0.02)
    packed = pack_linear(layer)
    assert resident_bytes(packed.modules()) == pytest.approx(
        weights * per_weight, rel=0.1
    )  # scales may be of 16 bits
    packed(torch.ones(1, 512, dtype=torch.bfloat16))  # a first step may lay the weights out anew
    assert resident_bytes(packed.modules()) == pytest.approx(weights * per_weight, rel=0.1)


def test_bytes_of_packed_layers() -> None:
    plain = nn.Linear(128, 64, bias=True, dtype=torch.bfloat16)
    assert resident_bytes([PackedLinear(plain)]) == 2 * (128 * 64 + 64)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_forward_reads_all_weights_but_the_embedding(kind: str) -> None:
    backbone = random_backbone(kind)
    tied = backbone.lm_head.weight is backbone.model.get_input_embeddings().weight
    expected = sum(p.nbytes for p in backbone.model.parameters()) - (
        0 if tied else backbone.model.get_input_embeddings().weight.nbytes
    )
    rotary = sum(buffer.nbytes for buffer in backbone.model.buffers())
    assert expected <= backbone_bytes(backbone) <= expected + 2 * rotary


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_tree_step_reads_the_heads_and_a_shared_lm_head_again(own: bool, quant: Quant) -> None:
    backbone = random_backbone()
    heads = random_heads(backbone, 3, own=own)
    plain = sum(p.nbytes for p in heads.parameters())
    runner = Runner(
        backbone, decoding_heads(heads, quant, CPU, torch.float32, backbone.lm_head), 64
    )
    vanilla, tree = (step_bytes(runner, 10, tree=tree) for tree in (False, True))
    # 2 of keys and values, 2 layers, 2 heads of 8 numbers of 4 bytes: 10 positions
    assert vanilla - backbone_bytes(backbone) == 10 * 2 * 2 * 2 * 8 * 4
    lm_head = 64 * 32 * 4
    if quant == "none":
        assert tree - vanilla == plain + (0 if own else lm_head)
    elif own:
        assert tree - vanilla < plain / 4
    else:  # a quantized copy of the LM head, or it itself
        assert tree - vanilla < plain / 4 + lm_head


# ---- the limit ----


def test_the_limit_is_the_caches_for_a_model_that_fits_into_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda device: 2**20)
    monkeypatch.setattr(
        bandwidth, "read_limit", lambda device, size: 200e9 if size <= 2**20 else 50e9
    )
    inside, outside = measure_limit(CPU, 2**19), measure_limit(CPU, 2**21)
    assert (inside["in_cache"], inside["gb_per_second"], inside["memory_gb_per_second"]) == (
        True,
        200.0,
        50.0,
    )
    assert (outside["in_cache"], outside["gb_per_second"], outside["buffer_bytes"]) == (
        False,
        50.0,
        2**22,
    )
    assert "cached_gb_per_second" not in outside


def test_the_buffer_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "BUFFER", 2**30)
    monkeypatch.setattr(bandwidth, "free_memory", lambda device: 2**22)
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda device: 0)
    assert measure_limit(CPU, 2**21)["buffer_bytes"] == 2**20


def test_a_read_takes_time_and_the_machine_tells_about_itself() -> None:
    assert bandwidth.read_limit(CPU, 2**16) > 0
    assert last_level_cache(CPU) >= 0
    assert free_memory("cpu") > 2**20
    held = torch.ones(2**25)
    peak = peak_memory()["host"]
    assert peak > held.nbytes
    del held
    reset_peak_memory()
    assert 0 < peak_memory()["host"] <= peak


def test_the_share_of_the_limit_is_the_floor_over_the_time() -> None:
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone))
    step = {"context": 4, "vanilla_ms": 2.0, "tree": {"overhead": 1.5}}
    found = reached(engine, step, {"gb_per_second": 0.05})
    floor = step_bytes(engine.runner, 4, tree=False) / 0.05e9
    assert found["vanilla"]["share_of_limit"] == pytest.approx(floor / 0.002, rel=1e-3)
    assert found["tree"]["gb_per_second"] == pytest.approx(
        found["tree"]["bytes"] / 0.003 / 1e9, abs=1e-3
    )


# ---- random shapes ----


def test_shapes_are_named_with_their_quantization() -> None:
    found = parse_shapes("tiny,vicuna-7b:nf4", "int8", heads=3, own=True)
    assert found == [
        RandomModel("tiny", "int8", "none", 3, True),
        RandomModel("vicuna-7b", "nf4", "none", 3, True),
    ]
    assert [each.name for each in found] == ["tiny:int8", "vicuna-7b:nf4"]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_random_shape_runs_behind_the_ordinary_engine(quant: Quant) -> None:
    engine = random_engine(RandomModel("tiny", quant), 6000, CPU, torch.bfloat16)
    assert (engine.heads, engine.context, engine.backbone.vocabulary) == (
        5,
        6000,
        512,
    )  # longer than it was made for
    steps = decode(engine, prompt_ids(9, 512), max_new_tokens=12)
    assert "".join(step.text for step in steps).split() == [
        str(t.id) for step in steps for t in step.tokens
    ]


def test_every_id_is_a_token() -> None:
    assert numbers(300).decode([0, 299, 17]).split() == ["0", "299", "17"]


def test_a_shape_beyond_the_memory_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shapes, "free_memory", lambda device: 8 * 2**30)
    monkeypatch.setattr(shapes, "random_model", None)
    with pytest.raises(
        UserError, match=r"vicuna-7b takes 1\d\.\d GiB, and 8\.0 GiB are free"
    ) as refusal:
        random_engine(RandomModel("vicuna-7b"), 1024, CPU, torch.bfloat16)
    assert "\n" not in str(refusal.value)


def test_a_shape_is_planned_for_as_a_real_model_is() -> None:
    def planned(quant: Quant = "none", own: bool = False) -> memory.MemoryPlan:
        return shapes.memory_plan(
            RandomModel("vicuna-7b", quant, own=own), 1024, CPU, torch.bfloat16
        )

    assert 13.5e9 < planned().total < 16e9
    assert 4.5e9 < planned("nf4").total < 6.5e9
    assert planned().parts()["heads"] == 5 * 4096 * 4097 * 2
    assert planned(own=True).parts()["heads"] == 5 * 4096 * (4097 + 32000) * 2
    real = memory.contents_of(
        read_models(packaged_file())["vicuna-7b"]
    )  # with the heads that were published for it
    assert real is not None
    assert planned(own=True) == memory.plan(real, memory.Load("cpu", context=1024))


def test_figures_of_random_shapes_are_marked_as_simulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts: list[str] = []
    from matplotlib.figure import Figure

    def written(self: Figure, *arguments: Any, **settings: Any) -> None:
        texts.extend(text.get_text() for legend in self.legends for text in legend.get_texts())

    monkeypatch.setattr(Figure, "savefig", written)
    words = [
        "bench",
        "--shape",
        "tiny,tiny:nf4",
        "--context",
        "16,40",
        "--history",
        "20",
        "--rounds",
        "1",
    ]
    assert (
        main([*words, "--modes", "greedy", "--device", "cpu", "--plot", str(tmp_path / "plots")])
        == 0
    )
    *text, line = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert (told["modes"], told["peers"], told["prompts"]) == ({}, {}, 0)
    assert list(told["shapes"]) == ["tiny", "tiny:nf4"]
    for shape in told["shapes"].values():
        for step in shape["steps"]:
            assert "Vicuna-7B" in step["tree"]["simulated"]
            assert step["tree"]["speedup"] == pytest.approx(
                step["tree"]["acceptance_length"] / step["tree"]["overhead"], rel=1e-3
            )
        assert shape["history"][0]["history"] == 20
        assert shape["parts"]["greedy"]["shares"]["heads"] > 0
    tables = "\n".join(text)
    for figure in ("acceptance length, ", "speedup, ", "tokens/s, "):
        assert tables.count(figure) == 2
    assert tables.count("SIMULATED") == 6
    assert sum("SIMULATED" in text for text in texts) == 4  # a line for each shape and context


def test_steps_behind_a_long_text_are_timed_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone))
    lengths = set()
    step = Runner.step

    def watched(self: Runner, *arguments: Any) -> Outcome:
        lengths.add(self.cache.length)
        return step(self, *arguments)

    monkeypatch.setattr(Runner, "step", watched)
    measure_steps(engine, (16, 100), quiet)
    assert lengths == {16, 100}


# ---- second turns ----


def test_a_second_turn_prefills_its_own_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone))
    runs: list[int] = []
    prefill = Runner.prefill

    def watched(self: Runner, tokens: list[int], rule: Any) -> int:
        runs.append(len(tokens))
        return prefill(self, tokens, rule)

    monkeypatch.setattr(Runner, "prefill", watched)
    found = history.measure_history(engine, (50, 200), 1, quiet)
    assert [row["prefilled"] for row in found] == [32, 32]
    assert runs == [50, 32, 82, 200, 32, 232]
    assert engine.tokens_in_context == 0


# ---- a fast step and its slow twins ----


class TwoStepped(Runner):
    """A runner with a captured step, which here is the eager one, or a wrong one."""

    lies = False

    def __init__(self, *arguments: Any, eager: bool = False) -> None:
        super().__init__(*arguments)
        self.eager = eager

    def step(self, *arguments: Any) -> Outcome:
        outcome = super().step(*arguments)
        return (
            outcome
            if self.eager or not self.lies
            else replace(outcome, next=(outcome.next + 1) % 64)
        )


@pytest.mark.parametrize("lies", [False, True])
def test_a_captured_step_is_compared_with_the_eager_one(
    lies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "Runner", TwoStepped)
    monkeypatch.setattr(TwoStepped, "lies", lies)
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone))
    engine.runner = fast = TwoStepped(backbone, random_heads(backbone), 512)
    tree = engine.tree
    found = twin.compare_with_eager(engine, [prompt_ids(9), prompt_ids(5)])
    assert set(found) == {"greedy", "typical", "exact", "vanilla"}
    for check in found.values():
        assert (check["replies"], check["equal"]) == (2, 0 if lies else 2)
        assert (check["agreed"] == 1) is not lies
        assert check["tokens_per_second"] > 0
    assert engine.runner is fast
    assert engine.tree is tree


def test_agreement_ends_at_a_replys_first_difference() -> None:
    ours, theirs = [[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]
    assert twin.agreement(ours, theirs) == {"replies": 2, "equal": 1, "agreed": 0.6667}
    assert twin.agreement([[1, 2]], [[1]]) == {"replies": 1, "equal": 0, "agreed": 0.5}


def test_a_comparison_is_over_one_tree_that_no_clock_chose() -> None:
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone), "chain-2")
    policy, tree = engine.policy, engine.tree
    with twin.same_tree(engine):
        assert engine.tree.origin == twin.TREE
        assert len(engine.tree) == 32
    assert (engine.policy, engine.tree) == (policy, tree)


def test_a_device_that_says_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_host_is_timed_between_static_steps_alone() -> None:
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
        host_gaps(engine, prompt_ids(5), replace(sampling, max_new_tokens=3, mode="vanilla"))
        is None
    )


def test_matrices_stay_apart_where_that_is_measured() -> None:
    joined, apart = (
        random_engine(RandomModel("tiny", fused=fused), 600, CPU, torch.float32)
        for fused in (True, False)
    )
    layers = [
        sum(isinstance(m, nn.Linear) for m in engine.backbone.model.modules())
        for engine in (joined, apart)
    ]
    assert layers[1] - layers[0] == 3 * TINY.layers
    said = [
        ids_of(decode(engine, prompt_ids(5, 512), max_new_tokens=8)) for engine in (joined, apart)
    ]
    assert said[0] == said[1]


def test_one_call_tells_the_whole_story_of_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU as the GPU, its steps static: every section is there, in the line of JSON and in words."""
    monkeypatch.setattr(measure, "is_gpu", lambda device: True)
    shapes_of_gpu = (RandomModel("tiny"), RandomModel("tiny", "nf4"), RandomModel("llama-70b"))
    monkeypatch.setattr(measure, "SHAPES_OF_GPU", shapes_of_gpu)
    monkeypatch.setitem(SHAPES, "llama-70b", replace(SHAPES["vicuna-7b"], layers=800))
    monkeypatch.setattr(runner_module, "capturable", lambda backbone, heads: True)
    monkeypatch.setattr(runner_module, "Captured", lambda device: as_it_is)
    monkeypatch.setattr(twin, "TOKENS", 6)
    words = [
        "--limit",
        "2",
        "--rounds",
        "1",
        "--modes",
        "greedy",
        "--max-new-tokens",
        "6",
        "--context",
        "16",
    ]
    assert main(["bench", "--device", "cpu", "--tree", "chain-2", *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told, text = json.loads(last), "\n".join(lines)
    for mode in ("greedy", "typical", "exact", "vanilla"):
        assert told["float32"]["cpu"][mode]["equal"] == 2
        assert told["float32"]["eager"][mode]["equal"] == 2
    for figures in (told, *told["shapes"].values()):
        assert set(figures["host"]) == {"vanilla", "greedy"}
        assert set(figures["eager"]) == {"greedy", "typical", "exact", "vanilla"}
        assert figures["limit"]["gb_per_second"] > 0
    assert list(told["shapes"]) == ["tiny", "tiny:nf4"]
    (step,), (apart,) = (told["shapes"]["tiny:nf4"][key] for key in ("steps", "apart"))
    assert set(step["nodes"]) == set(apart["nodes"]) >= {"4", "8", "16", "32", "64"}
    assert "apart" not in told["shapes"]["tiny"]
    assert "llama-70b takes" in told["left_out_shapes"]["llama-70b"]
    assert "llama-70b was left out" in text
    for part in ("as on the CPU", "as eager ones", "wait for the host", "joined, and apart"):
        assert part in text
    assert told["seconds"] > 0


def test_the_check_of_the_captured_step_is_told() -> None:
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
    bench_report._show_machine(console, figures)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    (row,) = (line for line in told.splitlines() if "greedy" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "greedy",
        "3 of 4, 80%",
        "300.0",
        "100.0",
        "0.123 ms",
    ]
    assert "steps cannot be recorded" in told
    assert "1.00 GiB on the host" in told
