"""The engine over the native step: its promises hold in every format of the weights."""

from __future__ import annotations

import os
from copy import deepcopy
from ctypes import string_at
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import medusa_chat
from medusa_chat import Sampling, UserError
from medusa_chat.config import LoadOptions, Message, ModelSpec
from medusa_chat.decoding.runner import Runner
from medusa_chat.machine import devices
from medusa_chat.model.linear.quantization import quantize_linear
from medusa_chat.model.loading import load_model
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.native import library
from medusa_chat.native.weights import Store, all_rows, pack
from tests.helpers.native_library import need_library
from tests.helpers.tiny import (
    decode,
    ids_of,
    prompt_ids,
    random_model,
    reply,
    save_model,
    save_with_heads,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.decoding.engine import Engine

need_library()

ASKED: list[list[Message]] = [
    [{"role": "user", "content": text}]
    for text in ("Hello!", "Tell me a short fairy tale.", "Say the same words again and again.")
]
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quant": "int8", "quant_heads": "int8"},
    "nf4": {"quant": "nf4", "quant_heads": "nf4"},
    "float32": {"dtype": "float32"},
}
TREES = ("chain-3", "mc_sim_7b_63", "static-16", "dynamic-16", "dynamic-64")


@pytest.fixture(scope="module", params=FORMATS)
def engine(request: pytest.FixtureRequest) -> Engine:
    named = FORMATS[request.param]
    return medusa_chat.load(device="cpu", tree="chain-1", probing=False, threads=2, **named)


def test_a_model_on_a_cpu_takes_the_native_step(engine: Engine) -> None:
    assert engine.backbone.step_name.startswith("native (")
    assert engine.backbone.step_name.endswith("), 2 threads")
    assert engine.notices == []


@pytest.mark.parametrize("copies", [False, True])
def test_greedy_is_vanilla_in_every_tree(engine: Engine, copies: bool) -> None:
    for asked in ASKED:
        plain = reply(engine, asked, mode="vanilla", temperature=0, max_new_tokens=40)
        for tree in TREES:
            engine.trees.use(tree)
            engine.trees.use_copies(copies)
            assert reply(engine, asked, max_new_tokens=40) == plain, tree
    assert len(plain) > 5


@pytest.mark.parametrize(("temperature", "top_p"), [(0.3, 1.0), (1.0, 0.9)])
def test_exact_is_vanilla_sampling(engine: Engine, temperature: float, top_p: float) -> None:
    drawn = Sampling(mode="exact", temperature=temperature, top_p=top_p, max_new_tokens=30)
    for seed, asked in enumerate(ASKED):
        drawn = replace(drawn, seed=seed)
        vanilla = replace(drawn, mode="vanilla")
        plain = ids_of(list(engine.generate(asked, vanilla)))
        for tree, copies in (("mc_sim_7b_63", False), ("dynamic-16", True)):
            engine.trees.use(tree)
            engine.trees.use_copies(copies)
            assert ids_of(list(engine.generate(asked, drawn))) == plain, tree


def test_a_reply_closed_at_any_step_leaves_a_sound_cache(engine: Engine) -> None:
    engine.trees.use("dynamic-16")
    for mode in ("greedy", "typical"):
        for steps in (0, 1, 4):
            engine.forget()
            stream = engine.generate(ASKED[1], Sampling(mode=mode, max_new_tokens=40))
            for _ in range(steps):
                next(stream)
            stream.close()
            assert len(engine.text) == engine.runner.cache.length
            kept = list(engine.text) or engine.encode(ASKED[1])
            ours = reply(engine, [*kept, 5], mode="vanilla", temperature=0, max_new_tokens=12)
            buffer = engine.runner.cache.buffer[..., : len(kept), :].clone()
            engine.forget()
            assert (
                reply(engine, [*kept, 5], mode="vanilla", temperature=0, max_new_tokens=12) == ours
            )
            assert torch.equal(engine.runner.cache.buffer[..., : len(kept), :], buffer)


def test_typical_replies_do_not_depend_on_threads(engine: Engine) -> None:
    """Each row is added up in one order, however many threads share it."""
    native = engine.backbone.native
    assert native is not None
    engine.trees.use("mc_sim_7b_63")
    settings = Sampling(mode="typical", max_new_tokens=30)
    ours = ids_of(list(engine.generate(ASKED[0], settings)))
    before = engine.runner
    team = type(native.team)(3)
    engine.backbone.native = replace(native, team=team)
    try:
        capacity = before.cache.capacity
        engine.runner = Runner(engine.backbone, before.heads, capacity, before.accuracy)
        engine.forget()
        assert ids_of(list(engine.generate(ASKED[0], settings))) == ours
    finally:
        engine.backbone.native = native
        engine.runner = before
        engine.forget()


# ---- the twin ----


@pytest.mark.parametrize("tree", ["mc_sim_7b_63", "dynamic-16"])
def test_the_native_step_writes_what_torch_writes_in_float32(tree: str) -> None:
    load: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "tree": tree,
        "probing": False,
    }
    native = medusa_chat.load(**load, engine="native")
    torchs = medusa_chat.load(**load, engine="torch")
    assert torchs.backbone.native is None
    for mode in ("vanilla", "greedy", "typical", "exact"):
        ours, theirs = (decode(each, ASKED[1], mode=mode) for each in (native, torchs))
        assert ids_of(ours) == ids_of(theirs), mode
        assert [step.depth for step in ours] == [step.depth for step in theirs]
        assert [step.accepted for step in ours] == [step.accepted for step in theirs]


# ---- choosing a step ----


def test_the_library_that_was_built_can_be_used() -> None:
    assert library.available() is None


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without the library."""
    monkeypatch.setenv("MEDUSA_CHAT_NATIVE", "off")
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.usefixtures("missing")
def test_torch_serves_where_the_library_is_missing() -> None:
    engine = medusa_chat.load(device="cpu", tree="chain-2", probing=False)
    assert engine.backbone.native is None
    assert engine.notices == []  # `doctor` says so; at each start it would be noise
    assert len(reply(engine, ASKED[0], max_new_tokens=5)) == 5
    with pytest.raises(UserError, match=r"^--engine native: MEDUSA_CHAT_NATIVE is off$"):
        medusa_chat.load(device="cpu", engine="native")


def test_a_family_that_the_library_does_not_know_runs_on_torch(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    folder = save_model(tmp_path, AutoModelForCausalLM.from_config(config))
    spec = ModelSpec("tiny", str(folder))
    loaded = load_model(spec, LoadOptions(device="cpu"))
    why = "the native step does not know gpt_neox models"
    assert loaded.notices == (f"torch's step runs this model: {why}",)
    assert loaded.backbone.native is None
    with pytest.raises(UserError, match=f"^--engine native: {why}$"):
        load_model(spec, LoadOptions(device="cpu", engine="native"))
    with pytest.raises(UserError, match=r"not float16$"):
        load_model(spec, LoadOptions(device="cpu", engine="native", dtype="float16"))


def test_heads_are_not_needed(tmp_path: Path) -> None:
    folder = save_model(tmp_path, random_model("qwen2", 320))
    engine = medusa_chat.load(str(folder), device="cpu", probing=False)
    assert engine.backbone.native is not None
    plain = reply(engine, prompt_ids(9), mode="vanilla", temperature=0, max_new_tokens=40)
    assert reply(engine, prompt_ids(9), max_new_tokens=40) == plain  # with copies


@pytest.mark.parametrize("quant", ["none", "int8", "nf4", "nf4-double"])
def test_the_models_own_weights_are_let_go(quant: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, random_model("llama", 320))
    loaded = load_model(ModelSpec("tiny", str(folder), quant=quant), LoadOptions(device="cpu"))
    matrices = [m for m in loaded.backbone.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(matrices) == 15
    assert all(matrix.weight is None for matrix in matrices)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_a_weight_that_is_no_number_is_named_before_it_is_packed(
    quant: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, random_model("llama", 320))
    file = folder / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][3, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"weight {name} holds NaN or infinity"):
        load_model(
            ModelSpec("tiny", str(folder), quant=quant), LoadOptions(device="cpu", engine="native")
        )


@pytest.mark.parametrize(("quant", "scale"), [("int8", "SCB"), ("nf4", "weight.absmax")])
def test_a_scale_of_bitsandbytes_that_is_no_number_is_named(
    quant: str, scale: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    plain = save_model(tmp_path / "plain", random_model("llama", 320, **sizes))
    model, words = load_pretrained(ModelSpec("tiny", str(plain)), torch.bfloat16, quant)
    folder = tmp_path / "own"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.up_proj.{scale}"
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"weight {name} holds NaN or infinity"):
        load_model(ModelSpec("own", str(folder)), LoadOptions(device="cpu", engine="native"))


def test_heads_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder = save_with_heads(tmp_path)
    file = folder / "medusa_heads" / "medusa_lm_head.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[3] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor {name} holds NaN or infinity"):
        load_model(ModelSpec("own", str(folder)), LoadOptions(device="cpu", engine="native"))


def test_nf4_has_the_values_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Linear(192, 97, bias=False).to(torch.bfloat16).requires_grad_(False)
    theirs = quantize_linear(deepcopy(plain), "nf4", torch.device("cpu"))
    packed = [_packed_bytes(layer) for layer in (plain, theirs)]
    assert packed[0] == packed[1]


def _packed_bytes(layer: Any) -> bytes:
    store = Store()
    matrix = pack([all_rows(layer)], "nf4", store)
    return string_at(matrix.packed, store.bytes)


# ---- threads ----


def test_threads_are_the_cores_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight processors of four cores, of which the process may use six and its container two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(devices, "PROCESSORS", tmp_path)
    monkeypatch.setattr(devices, "CGROUP", tmp_path / "none")
    assert devices.usable_cores() == 6  # the system does not say which share a core
    for processor in range(8):
        topology = tmp_path / f"cpu{processor}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{processor % 4}\n")
    assert devices.usable_cores() == 4
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    for quota, expected in (("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert devices.usable_cores() == expected


def test_threads_must_be_a_sensible_number() -> None:
    for threads in (0, 257):
        with pytest.raises(UserError, match=f"threads must be 1 to 256, not {threads}"):
            LoadOptions(threads=threads)
