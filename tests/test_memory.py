"""Planned memory against real sizes, and proposals that fit."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import medusa_chat
from medusa_chat.config import MAX_NODES, ModelSpec, UserError
from medusa_chat.hub.model_list import packaged_file, read_models, resolve_model
from medusa_chat.machine import devices, memory, plans
from medusa_chat.machine.contents import Contents, contents_of
from medusa_chat.machine.memory import remedies, shortage
from medusa_chat.machine.plans import Load, host_plan, load_of, plan
from medusa_chat.model.heads import HeadVocabulary
from medusa_chat.model.layouts import OWN_HEADS, write_heads
from medusa_chat.shapes import SHAPES
from tests.helpers.complaints import refusal
from tests.helpers.native_library import need_library
from tests.helpers.tiny import random_backbone, random_heads, random_model, save_model

GB = 10**9
ODD = json.dumps(
    {
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": -3,
    }
)
SHIPPED = read_models(packaged_file())


def contents_of_known(spec: ModelSpec) -> Contents:
    contents = contents_of(spec)
    assert contents is not None
    return contents


VICUNA = contents_of_known(SHIPPED["vicuna-7b"])


def planned(spec: ModelSpec, load: Load) -> dict[str, int]:
    return plan(contents_of_known(spec), load).parts()


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by device, which a test may change."""
    found = {"cpu": 10**15, "cuda": 10**15}
    monkeypatch.setattr(memory, "free_memory", lambda device: found[device])
    return found


def refused(spec: ModelSpec, load: Load) -> str:
    return refusal(memory.check, spec, load)


# ---- counting ----


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3", "gemma2"]
)
@pytest.mark.parametrize("own", [True, False])
def test_every_weight_of_a_folder_is_counted(kind: str, own: bool, tmp_path: Path) -> None:
    model = random_model(kind, 260)
    heads = random_heads(random_backbone(kind, 260), 3, layers=2, own=own)
    save_model(tmp_path, model)
    write_heads(heads, tmp_path)
    contents = contents_of(ModelSpec("tiny", str(tmp_path)))
    assert contents is not None
    assert contents.layers + contents.plain == sum(weight.numel() for weight in model.parameters())
    matrices = [m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    assert contents.layers == sum(weight.numel() for weight in matrices)
    assert contents.largest == max(weight.numel() for weight in matrices)
    assert contents.heads == sum(weight.numel() for weight in heads.parameters())
    file = contents_of(ModelSpec("tiny", str(tmp_path), heads=str(tmp_path / OWN_HEADS)))
    assert file == contents


@pytest.mark.parametrize("own", [True, False])
def test_bias_and_vocabulary_of_heads_are_counted_apart(own: bool, tmp_path: Path) -> None:
    model, backbone = random_model("llama", 260), random_backbone("llama", 260)
    cut = HeadVocabulary(torch.arange(0, 260, 2), 260)
    heads = random_heads(backbone, 3, own=own, vocabulary=cut, parent_bias=5)
    save_model(tmp_path / "a", model)
    bare = contents_of(ModelSpec("tiny", str(tmp_path / "a")))
    write_heads(heads, tmp_path / "a")
    write_heads(heads, tmp_path / "b")
    contents = contents_of(ModelSpec("tiny", str(tmp_path / "a")))
    assert contents is not None
    assert bare is not None
    assert (contents.layers, contents.plain) == (bare.layers, bare.plain)
    assert contents.heads == sum(weight.numel() for weight in heads.parameters())
    assert (contents.parent_bias, contents.head_tokens) == (5 * (131 + 130), 130)
    assert contents.largest_head == (130 * 32 if own else 32 * 32)
    spec = ModelSpec("tiny", str(tmp_path / "a"), heads=str(tmp_path / "b"))
    assert contents_of(spec) == contents
    matrices = contents.heads - contents.parent_bias + (0 if own else 130 * 32)
    bias = contents.parent_bias
    for width in (2, 4):
        assert plan(contents, Load(width=width)).heads == (matrices + bias) * width
        quantized = plan(contents, Load(width=width, quant_heads="int8"))
        assert quantized.heads == matrices + bias * width


def test_vllms_token_map_is_no_weight(tmp_path: Path) -> None:
    backbone = random_backbone(vocabulary=260)
    save_model(tmp_path, backbone.model)
    tensors = {
        "blocks.0.layers.0.weight": torch.zeros(32, 32),
        "lm_heads.0.weight": torch.zeros(100, 32),
        "token_map": torch.arange(100),
    }
    (tmp_path / "heads").mkdir()
    save_file(tensors, tmp_path / "heads" / "model.safetensors")
    found = contents_of(ModelSpec("tiny", str(tmp_path), heads=str(tmp_path / "heads")))
    assert found is not None
    assert (found.heads, found.largest_head, found.head_tokens) == (132 * 32, 100 * 32, 100)


def test_an_entry_has_the_sizes_of_its_files(tmp_path: Path) -> None:
    """Before a download the sizes come from models.yaml; they are those of the files."""
    backbone = random_backbone(vocabulary=260)
    save_model(tmp_path / "a", backbone.model)
    write_heads(random_heads(backbone, 3), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    counted = contents_of(ModelSpec("tiny", str(tmp_path / "a")))
    entry = contents_of(ModelSpec("tiny", str(tmp_path / "b"), medusa_heads=3))
    assert entry == counted
    shared = ModelSpec("tiny", str(tmp_path / "b"), medusa_heads=3, lm_heads="shared")
    assert counted is not None
    assert counted.heads - contents_of_known(shared).heads == 3 * 260 * 32


def test_published_sizes() -> None:
    """Files on the hub, to a thousandth: heads of three models, and a whole Medusa-2 model."""
    sizes = {"vicuna-7b": 1.478493e9, "vicuna-33b": 2.57e9, "mistral-7b-instruct-v0.2": 0.887e9}
    for name, size in sizes.items():
        contents = contents_of(SHIPPED[name])
        assert contents is not None
        assert 2 * contents.heads == pytest.approx(size, rel=2e-3)
    whole = contents_of(SHIPPED["vicuna-33b-medusa2"])
    assert whole is not None
    assert 2 * (whole.layers + whole.plain + whole.heads) == pytest.approx(67.64e9, rel=1e-3)


def test_heads_among_the_backbones_weights_and_in_a_pickle(tmp_path: Path) -> None:
    backbone = random_backbone(vocabulary=260)
    save_model(tmp_path, backbone.model)
    plain = contents_of(ModelSpec("tiny", str(tmp_path)))
    assert plain is not None
    (tmp_path / "other.safetensors").write_bytes(b"")  # damaged: whoever loads it says so
    extra = {
        "medusa_head.0.0.linear.weight": torch.zeros(32, 32),
        "medusa_head.0.1.weight": torch.zeros(260, 32),
    }
    save_file(extra, tmp_path / "model-2.safetensors")
    within = contents_of(ModelSpec("tiny", str(tmp_path)))
    assert within == replace(plain, heads=32 * 32 + 260 * 32, largest_head=260 * 32)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "medusa_lm_head.pt").write_bytes(bytes(40_000))
    pickled = contents_of(ModelSpec("tiny", str(tmp_path), heads=str(tmp_path / "heads")))
    assert pickled is not None
    assert (pickled.heads, pickled.largest_head) == (20_000, 260 * 32)


def test_quantized_files_count_with_their_own_bytes(tmp_path: Path) -> None:
    save_model(tmp_path, random_model(vocabulary=260))
    name = "model.layers.0.mlp.up_proj.weight"
    header = {
        name: {"dtype": "U8", "shape": [768, 1], "data_offsets": [0, 768]},
        f"{name}.absmax": {"dtype": "F32", "shape": [24], "data_offsets": [768, 864]},
        "model.layers.0.mlp.down_proj.qweight": {
            "dtype": "I32",
            "shape": [4, 32],
            "data_offsets": [864, 1376],
        },
        "model.norm.weight": {"dtype": "F16", "shape": [32], "data_offsets": [1376, 1440]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(1440))
    for quant in ("none", "nf4"):
        parts = planned(ModelSpec("tiny", str(tmp_path)), Load(quant=quant))
        assert (parts["packed"], parts["plain"]) == (1376, 64)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"num_attention_heads": 0}', '{"hidden_size": "x"}', ODD]
)
def test_unknown_sizes_stop_nothing(text: str | None, tmp_path: Path, free: dict[str, int]) -> None:
    free["cpu"] = 0
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for spec in (ModelSpec("a", str(tmp_path)), ModelSpec("a", "nobody/nothing")):
        assert contents_of(spec) is None
        memory.check(spec, Load())


# ---- planning ----


def test_parts_of_vicuna_7b() -> None:
    """In 16 bits an LM head has 0.26 GB, five heads 1.48 GB, and a cache of 4096 tokens 2 GB."""
    sixteen = planned(SHIPPED["vicuna-7b"], Load("cuda", context=4096 - MAX_NODES))
    assert sixteen["layers"] == pytest.approx(12.95 * GB, rel=0.01)
    assert sixteen["plain"] == pytest.approx(2 * 0.262 * GB, rel=0.01)
    assert sixteen["heads"] == pytest.approx(1.48 * GB, rel=0.01)
    assert sixteen["cache"] == 2 * 32 * 4096 * 4096 * 2
    nf4 = planned(SHIPPED["vicuna-7b"], Load("cuda", "nf4", "nf4", 4096 - MAX_NODES))
    assert nf4["layers"] == int(VICUNA.layers * 0.5625)
    assert nf4["heads"] == int(VICUNA.heads * 0.5625)
    assert nf4["plain"] == sixteen["plain"]
    assert (
        nf4["workspace"] - sixteen["workspace"] == 2 * (2 * 11008 * 4096) * 2
    )  # gate and up in 16 bits, twice
    assert planned(SHIPPED["vicuna-7b"], Load("cuda", "nf4-double"))["layers"] == pytest.approx(
        0.5159 * VICUNA.layers, rel=1e-3
    )
    assert planned(SHIPPED["vicuna-7b"], Load("cuda", "int8"))["layers"] == VICUNA.layers


def test_the_planned_cache_has_the_size_of_the_real_one(tmp_path: Path) -> None:
    backbone = random_backbone("llama-wide-heads", 260)
    save_model(tmp_path, backbone.model)
    engine = medusa_chat.load(
        str(tmp_path), device="cpu", dtype="float32", context=100, tree="auto"
    )
    made = engine.runner.cache.buffer
    assert (
        planned(ModelSpec("a", str(tmp_path)), Load(context=100, width=4))["cache"]
        == made.numel() * made.element_size()
    )


def test_the_workspace_holds_the_logits_of_the_largest_tree() -> None:
    logits = MAX_NODES * SHAPES["llama-8b"].vocabulary * 4  # in float32
    spec = ModelSpec("a", "nobody/nothing", shape="llama-8b")
    assert planned(spec, Load(context=256))["workspace"] > 3 * logits


def test_a_gpu_needs_little_of_the_host() -> None:
    on_host = host_plan(VICUNA, Load("cuda", "nf4", "nf4")).total
    assert on_host < 5 * GB
    assert shortage(VICUNA, Load("cuda", "nf4", "nf4"), {"cuda": 24 * GB, "cpu": 24 * GB})[2] <= 0
    lacking = shortage(VICUNA, Load("cuda", "nf4", "nf4"), {"cuda": 24 * GB, "cpu": 1 * GB})
    assert lacking == ("cpu", on_host, on_host - GB)


MEASURE = """
import sys, torch
from medusa_chat.machine.devices import frugal_heap
from contextlib import nullcontext
from bitsandbytes.functional import quantize_4bit

def in_use():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

weight = torch.ones(1024, 3072, dtype=torch.bfloat16)
with frugal_heap():
    quantize_4bit(weight, quant_type="nf4")
before, kept = in_use(), []
with frugal_heap() if sys.argv[1] == "frugal" else nullcontext():
    for _ in range(8):
        kept.append(quantize_4bit(weight, quant_type="nf4"))
print((in_use() - before) / (8 * weight.numel()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_quantizing_leaves_no_holes() -> None:
    def bytes_of_a_weight(how: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    assert bytes_of_a_weight("frugal") == pytest.approx(plans.BYTES["nf4"], rel=0.05)
    assert (
        bytes_of_a_weight("plain") > 1.15 * plans.BYTES["nf4"]
    )  # else there is no need of it any more


# ---- proposals ----


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SHIPPED)),
    device=st.sampled_from(["cpu", "cuda"]),
    quant=st.sampled_from(["none", "nf4", "int8"]),
    heads=st.sampled_from(["none", "nf4", "int8"]),
    context=st.none() | st.integers(300, 8192),
    gigabytes=st.floats(0.5, 70),
)
def test_every_proposal_fits(
    name: str, device: str, quant: str, heads: str, context: int | None, gigabytes: float
) -> None:
    contents = contents_of(SHIPPED[name])
    assert contents is not None
    load, free = (
        Load(device, quant, heads, context),
        {device: int(gigabytes * GB), "cpu": int(gigabytes * GB)},
    )
    if shortage(contents, load, free)[2] <= 0:
        return
    for remedy in remedies(contents, load, free):
        words = remedy.replace(" with ", " ").split()
        flags = dict(zip(words[::2], words[1::2], strict=True))
        model = flags.get("--model")
        other = contents if model is None else contents_of(SHIPPED[model])
        changed = load if model is None else load_of(SHIPPED[model], device)
        changed = replace(changed, quant=flags.get("--quant", changed.quant))
        changed = replace(changed, quant_heads=flags.get("--quant-heads", changed.quant_heads))
        changed = replace(changed, context=int(flags.get("--max-context", 0)) or changed.context)
        assert other is not None
        assert shortage(other, changed, free)[2] <= 0, remedy


def test_the_complaint_says_by_how_much_and_what_helps(free: dict[str, int]) -> None:
    spec = SHIPPED["vicuna-7b"]
    sixteen, nf4 = Load("cpu"), Load("cpu", "nf4", "nf4")
    long = replace(sixteen, context=4096)
    need = plan(VICUNA, long).total
    free["cpu"] = need
    memory.check(spec, long)
    free["cpu"] = need - GB // 2
    line = refused(spec, long)
    assert line.startswith(
        f"vicuna-7b needs {need / GB:.1f} GB, {free['cpu'] / GB:.1f} GB free on cpu, 0.5 GB short; "
    )
    assert "short; --quant nf4 or --quant-heads nf4 or --max-context 3" in line
    assert line.endswith("--ignore-memory goes on all the same")
    free["cpu"] = plan(VICUNA, nf4).total + 10**6
    memory.check(spec, nf4)
    assert "short; --quant nf4 or --model smollm2 would" in refused(spec, sixteen)
    # A long context, which weighs more than what passes while heads are quantized.
    sixteen, nf4 = replace(sixteen, context=8000), replace(nf4, context=8000)
    free["cpu"] = plan(VICUNA, replace(nf4, context=6000)).total
    assert "short; --quant nf4 with --quant-heads nf4 with --max-context 5952 or" in refused(
        spec, sixteen
    )
    assert "short; --max-context 5952 or --model smollm2 would" in refused(spec, nf4)
    free["cpu"] = 10**6
    assert "nothing that medusa-chat can change would make it fit" in refused(spec, nf4)
    free["cpu"] = 10 * GB
    assert "short; --model zephyr-7b-beta would" in refused(SHIPPED["vicuna-13b"], Load("cpu"))


def test_the_gpu_that_is_full_is_named(free: dict[str, int]) -> None:
    free["cuda"] = 6 * GB
    assert "6.0 GB free on cuda" in refused(
        SHIPPED["vicuna-7b"], load_of(SHIPPED["vicuna-7b"], "cuda", 4096)
    )
    free["cuda"], free["cpu"] = 60 * GB, 2 * GB
    assert "2.0 GB free on cpu" in refused(
        SHIPPED["vicuna-7b"], load_of(SHIPPED["vicuna-7b"], "cuda")
    )


# ---- a load ----


def test_a_load_checks_memory_unless_it_is_ignored(free: dict[str, int]) -> None:
    free["cpu"] = 10**6
    with pytest.raises(UserError, match=r"bundled needs .* GB free on cpu, .* GB short; nothing"):
        medusa_chat.load(device="cpu")
    assert medusa_chat.load(device="cpu", ignore_memory=True, tree="chain-1").heads == 5


@pytest.mark.parametrize("step", ["native", "torch"])
def test_the_asked_context_counts(step: str, free: dict[str, int]) -> None:
    if step == "native":
        need_library()
    spec = resolve_model(None)
    contents = contents_of(spec)
    assert contents is not None
    free["cpu"] = plan(contents, Load(context=300, width=4, native=step == "native")).total
    medusa_chat.load(device="cpu", dtype="float32", context=300, tree="chain-1", engine=step)
    with pytest.raises(UserError, match="--max-context 256 would make it fit"):
        medusa_chat.load(device="cpu", dtype="float32", context=400, engine=step)


# ---- free memory ----


def test_free_memory_includes_that_of_this_process() -> None:
    assert 10**8 < devices.free_memory("cpu") <= devices.total_memory("cpu")


def test_a_container_may_allow_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = devices.free_memory("cpu")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    for name, text in (
        ("max", "900000000"),
        ("current", "500000000"),
        ("stat", "anon 4\ninactive_file 100000000"),
    ):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert devices.container_memory() == 500_000_000
    assert devices.free_memory("cpu") < before
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.container_memory() > 10**8


def test_shapes_of_the_list_are_those_of_the_backbones() -> None:
    assert {spec.shape for spec in SHIPPED.values() if spec.shape} <= set(SHAPES)
