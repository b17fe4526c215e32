"""bench's measurements of the machine: bytes of a step, the limit, random shapes, second turns."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import nn

from medusa_chat.bench import bandwidth, history, random_engine
from medusa_chat.bench.bandwidth import backbone_bytes, measure_limit, resident_bytes, step_bytes
from medusa_chat.bench.random_engine import RandomModel, memory_plan, numbers, parse_shapes
from medusa_chat.bench.steps import bandwidth_of, measure_steps
from medusa_chat.cli import main
from medusa_chat.config import LoadOptions, Quant, UserError
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees import costs
from medusa_chat.hub.model_list import packaged_file, read_models
from medusa_chat.machine import plans
from medusa_chat.machine.contents import contents_of
from medusa_chat.machine.devices import (
    free_memory,
    last_level_cache,
    peak_memory,
    reset_peak_memory,
)
from medusa_chat.model.heads import decoding_heads
from medusa_chat.model.linear.packed import PackedLinear, has_bfloat16, pack_linear
from medusa_chat.model.linear.quantization import quantize_linear
from medusa_chat.shapes import SHAPES, Shape
from tests.helpers.quiet import quiet
from tests.helpers.steps import surround_steps
from tests.helpers.tiny import decode, make_engine, prompt_ids, random_backbone, random_heads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.decoding.report import StepReport
    from medusa_chat.decoding.trees.tree import AnyTree

CPU = torch.device("cpu")
TINY = Shape(2, 64, 128, 4, 2, 512, tied=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "REPEATS", 1)
    monkeypatch.setattr(bandwidth, "BUFFER", 2**20)
    monkeypatch.setitem(SHAPES, "tiny", TINY)


# ---- bytes ----


def test_bytes_are_counted_once_however_many_tensors_share_them() -> None:
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=True)
    assert resident_bytes([first, second]) == 4 * (32 + 32 + 4)
    second.weight = first.weight
    assert resident_bytes([first, second]) == 4 * (32 + 4)
    fused = torch.zeros(6, 8)
    # Views that overlap by two rows.
    first.weight = nn.Parameter(fused[:4])
    second.weight = nn.Parameter(fused[2:])
    assert resident_bytes([first, second]) == 4 * (48 + 4)


@pytest.mark.parametrize(
    ("quant", "per_weight"), [("nf4", 0.5 + 4 / 64), ("nf4-double", 0.5 + 1 / 64), ("int8", 1.0)]
)
def test_bytes_of_quantized_layers_are_those_in_memory(quant: Quant, per_weight: float) -> None:
    plain = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    layer = quantize_linear(plain, quant, CPU)
    weights = 512 * 256
    assert resident_bytes(layer.modules()) == pytest.approx(weights * per_weight, rel=0.02)
    packed = pack_linear(layer)
    # Scales may have 16 bits.
    assert resident_bytes(packed.modules()) == pytest.approx(weights * per_weight, rel=0.1)
    packed(torch.ones(1, 512, dtype=torch.bfloat16))  # the first step may change the layout
    assert resident_bytes(packed.modules()) == pytest.approx(weights * per_weight, rel=0.1)


@pytest.mark.skipif(not has_bfloat16(), reason="oneDNN packs no bfloat16 on this processor")
def test_bytes_of_packed_layers() -> None:
    plain = nn.Linear(128, 64, bias=True, dtype=torch.bfloat16)
    assert resident_bytes([PackedLinear(plain)]) == 2 * (128 * 64 + 64)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_forward_reads_all_weights_but_the_embedding(kind: str) -> None:
    backbone = random_backbone(kind)
    tied = backbone.lm_head.weight is backbone.model.get_input_embeddings().weight
    expected = sum(p.nbytes for p in backbone.model.parameters())
    if not tied:
        expected -= backbone.model.get_input_embeddings().weight.nbytes
    rotary = sum(buffer.nbytes for buffer in backbone.model.buffers())
    assert expected <= backbone_bytes(backbone) <= expected + 2 * rotary


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_tree_step_reads_the_heads_and_a_shared_lm_head_again(own: bool, quant: Quant) -> None:
    backbone = random_backbone()
    heads = random_heads(backbone, 3, own=own)
    plain = sum(p.nbytes for p in heads.parameters())
    quantized = decoding_heads(heads, quant, CPU, torch.float32, backbone.lm_head)
    runner = Runner(backbone, quantized, 64)
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


def test_the_limit_is_that_of_the_cache_for_a_model_that_fits_into_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda _: 2**20)
    limit = lambda _, size: 200e9 if size <= 2**20 else 50e9  # noqa: E731
    monkeypatch.setattr(bandwidth, "read_limit", limit)
    inside = measure_limit(CPU, 2**19)
    assert inside["in_cache"]
    assert inside["gb_per_second"] == 200.0
    assert inside["memory_gb_per_second"] == 50.0
    outside = measure_limit(CPU, 2**21)
    assert not outside["in_cache"]
    assert outside["gb_per_second"] == 50.0
    assert outside["buffer_bytes"] == 2**22
    assert "cached_gb_per_second" not in outside


def test_the_buffer_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "BUFFER", 2**30)
    monkeypatch.setattr(bandwidth, "free_memory", lambda _: 2**22)
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda _: 0)
    assert measure_limit(CPU, 2**21)["buffer_bytes"] == 2**20


def test_the_machine_reports_its_reads_and_memory() -> None:
    assert bandwidth.read_limit(CPU, 2**16) > 0
    assert last_level_cache(CPU) >= 0
    assert free_memory("cpu") > 2**20
    held = torch.ones(2**25)
    peak = peak_memory()["host"]
    assert peak > held.nbytes
    del held
    reset_peak_memory()
    assert 0 < peak_memory()["host"] <= peak


def test_the_share_of_the_limit_is_the_shortest_time_over_the_real_one() -> None:
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone))
    step = {"context": 4, "vanilla_ms": 2.0, "tree": {"overhead": 1.5}}
    found = bandwidth_of(engine, step, {"gb_per_second": 0.05})
    floor = step_bytes(engine.runner, 4, tree=False) / 0.05e9
    assert found["vanilla"]["share_of_limit"] == pytest.approx(floor / 0.002, rel=1e-3)
    assert found["tree"]["gb_per_second"] == pytest.approx(
        found["tree"]["bytes"] / 0.003 / 1e9, abs=1e-3
    )


# ---- random shapes ----

IN_BFLOAT16 = LoadOptions(dtype="bfloat16")


def test_names_of_shapes_contain_their_quantization() -> None:
    found = parse_shapes("tiny,vicuna-7b:nf4", "int8", heads=3, own=True)
    assert found == [
        RandomModel("tiny", "int8", "none", 3, True),
        RandomModel("vicuna-7b", "nf4", "none", 3, True),
    ]
    assert [each.name for each in found] == ["tiny:int8", "vicuna-7b:nf4"]


@pytest.mark.parametrize("step", ["auto", "torch"])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_a_random_shape_runs_behind_the_ordinary_engine(
    quant: Quant, step: Literal["auto", "torch"]
) -> None:
    options = LoadOptions(dtype="bfloat16", engine=step)
    engine = random_engine.random_engine(RandomModel("tiny", quant), 6000, CPU, options)
    assert engine.heads == 5
    assert engine.context == 6000  # more than the shape has
    assert engine.backbone.vocabulary == 512
    steps = decode(engine, prompt_ids(9, 512), max_new_tokens=12)
    assert "".join(step.text for step in steps).split() == [
        str(t.id) for step in steps for t in step.tokens
    ]


def test_every_id_is_a_token() -> None:
    assert str(numbers(300).decode([0, 299, 17])).split() == ["0", "299", "17"]


def test_a_shape_beyond_the_memory_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random_engine, "free_memory", lambda _: 8 * 2**30)
    monkeypatch.setattr(random_engine, "random_model", None)
    with pytest.raises(
        UserError, match=r"vicuna-7b takes 1\d\.\d GiB, and 8\.0 GiB are free"
    ) as refusal:
        random_engine.random_engine(RandomModel("vicuna-7b"), 1024, CPU, IN_BFLOAT16)
    assert "\n" not in str(refusal.value)


def test_a_shape_is_planned_for_as_a_real_model_is() -> None:
    def planned(quant: Quant = "none", own: bool = False) -> plans.MemoryPlan:
        return memory_plan(RandomModel("vicuna-7b", quant, own=own), 1024, CPU, torch.bfloat16)

    assert 13.5e9 < planned().total < 16e9
    assert 4.5e9 < planned("nf4").total < 6.5e9
    assert planned().parts()["heads"] == 5 * 4096 * 4097 * 2
    assert planned(own=True).parts()["heads"] == 5 * 4096 * (4097 + 32000) * 2
    real = contents_of(
        read_models(packaged_file())["vicuna-7b"]
    )  # with the heads that were published for it
    assert real is not None
    assert planned(own=True) == plans.plan(real, plans.Load("cpu", context=1024))


def test_figures_of_random_shapes_are_marked_as_simulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts: list[str] = []
    from matplotlib.figure import Figure

    def written(self: Figure, *_: Any, **__: Any) -> None:
        texts.extend(text.get_text() for legend in self.legends for text in legend.get_texts())

    monkeypatch.setattr(Figure, "savefig", written)
    words = "bench --shape tiny,tiny:nf4 --context 16,40 --history 20 --rounds 1 --modes greedy"
    words += f" --device cpu --plot {tmp_path / 'plots'}"
    assert main(words.split()) == 0
    *text, line = capsys.readouterr().out.splitlines()
    printed = json.loads(line)
    assert (printed["modes"], printed["peers"], printed["prompts"]) == ({}, {}, 0)
    assert list(printed["shapes"]) == ["tiny", "tiny:nf4"]
    for shape in printed["shapes"].values():
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


def test_steps_are_timed_at_the_asked_number_of_cached_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = random_backbone()
    engine = make_engine(backbone, random_heads(backbone))
    lengths = set()

    def watch(runner: Runner, _: AnyTree, finish: Callable[[], StepReport]) -> StepReport:
        lengths.add(runner.cache.length)
        return finish()

    surround_steps(monkeypatch, watch)
    measure_steps(engine, (16, 100), quiet)
    assert lengths == {16, 100}


# ---- second turns ----


def test_a_second_turn_prefills_only_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
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
