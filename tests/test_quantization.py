"""Backbones and heads in nf4 and int8: correct text, and steps nearly as long as in 16 bits."""

from __future__ import annotations

import gc
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import medusa_chat
from medusa_chat import Sampling, UserError
from medusa_chat.bench import near_ties
from medusa_chat.bench.peers import TransformersPeer
from medusa_chat.bench.random_model import random_heads, random_model
from medusa_chat.bench.verification import Comparison, verify
from medusa_chat.config import LoadOptions, Message, ModelSpec, Quant
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import Heads, LinearHeads, MedusaHeads, decoding_heads
from medusa_chat.model.linear.packed import Int8Linear, has_bfloat16, pack_linear, pack_linears
from medusa_chat.model.linear.quantization import (
    compute_dtype,
    prepare_4bit,
    quant_of,
    quantization_config,
    quantize_linear,
)
from medusa_chat.model.loading import load_model
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.native.model import NativeHeads
from medusa_chat.prompts import Prompt
from medusa_chat.shapes import Shape
from tests.helpers.tiny import reply, save_model

bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16  # noqa: E402

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine

CPU = torch.device("cpu")
ON_CPU = LoadOptions(device="cpu", engine="torch")
QUANTS: tuple[Quant, ...] = ("nf4", "nf4-double", "int8")
SHAPE = Shape(
    layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=512, context=256
)
PROMPT: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
needs_dots = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="no 8-bit dot products here"
)
needs_packed_4bit = pytest.mark.skipif(not has_avx512bf16(), reason="no AVX512-BF16 here")
DTYPE = torch.bfloat16 if has_bfloat16() else torch.float32


def bundled(
    quant: str = "auto", quant_heads: str = "auto", dtype: str = "auto", fuse: bool = True
) -> Engine:
    return medusa_chat.load(
        device="cpu",
        engine="torch",
        quant=quant,
        quant_heads=quant_heads,
        dtype=dtype,
        tree="mc_sim_7b_63",
        probing=False,
        fuse=fuse,
    )


def linear(
    inside: int = 128, outside: int = 96, bias: bool = True, dtype: torch.dtype = DTYPE
) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inside, outside, bias).to(dtype).requires_grad_(False)


def acceptance_length(engine: Engine) -> float:
    prompts = (
        "Tell me a story about a fox.",
        "What is the capital of Spain?",
        "I feel a bit sad today.",
        "Can you book a table for two?",
        "How are you?",
        "Tell me about your family.",
    )
    steps = [
        step
        for text in prompts
        for step in engine.generate(
            [Message(role="user", content=text)], Sampling(max_new_tokens=80)
        )
    ]
    return sum(len(step.tokens) for step in steps) / len(steps)


@pytest.mark.parametrize(
    "quant", ["nf4", "int8", pytest.param("nf4-double", marks=pytest.mark.slow)]
)
def test_the_bundled_model_decodes_right_in_each_quantization(quant: str) -> None:
    engine = bundled(quant, quant)
    assert quant_of(engine.backbone.model.config) == quant
    prompts = [Prompt("a", (PROMPT[0]["content"],)), Prompt("b", ("Tell me a story.",))]
    checks = verify(
        engine, prompts, Sampling(max_new_tokens=10), turns=1, progress=lambda _done, _total: None
    )
    assert "vanilla, generate()" in {check.name for check in checks}  # on a peer quantized alike
    assert [check.first_fault for check in checks if check.faults] == []
    assert sum(check.equal for check in checks) > 0.8 * sum(check.replies for check in checks)


def test_steps_stay_nearly_as_long() -> None:
    plain = acceptance_length(bundled())
    assert plain > 2
    for quant in ("nf4", "int8"):
        # Over many prompts it is within 5%.
        assert acceptance_length(bundled(quant)) > 0.9 * plain, quant


def test_float32_computes_in_float32() -> None:
    engine = bundled("nf4", dtype="float32", fuse=False)
    layer: Any = engine.backbone.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    wanted = x @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert reply(engine, PROMPT, max_new_tokens=12) == reply(
        engine, PROMPT, mode="vanilla", temperature=0, max_new_tokens=12
    )


@needs_packed_4bit
@pytest.mark.parametrize("quant", ["nf4", "nf4-double"])
def test_four_bit_layers_are_packed_at_load(quant: Quant) -> None:
    layer: Any = quantize_linear(linear(), quant, CPU)
    x = torch.randn(5, 128).bfloat16()
    wanted = (
        x.float() @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
        + layer.bias.float()
    )
    assert pack_linear(layer) is layer
    packed = layer.weight.data
    assert layer.weight.quant_state.packing_format_for_cpu
    assert packed.shape == (96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).float(), wanted, rtol=0.02, atol=0.02)
    assert layer.weight.data.data_ptr() == packed.data_ptr(), "the first step packed again"
    # 4 bits a weight and a 16-bit scale for 64 of them: nothing of the unpacked layer is left.
    state = layer.weight.quant_state
    assert packed.nbytes + state.absmax.nbytes == 96 * 128 // 2 + 96 * 2 * 2
    assert not state.nested


@pytest.mark.parametrize(("inside", "outside"), [(96, 96), (128, 100)])
def test_shapes_that_cannot_be_packed_still_multiply(inside: int, outside: int) -> None:
    layer: Any = pack_linear(quantize_linear(linear(inside, outside, False), "nf4", CPU))
    x = torch.randn(5, inside).to(DTYPE)
    wanted = x.float() @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
    torch.testing.assert_close(layer(x).float(), wanted, rtol=0.02, atol=0.02)


@needs_dots
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_layers_multiply_exactly_what_bitsandbytes_stores(
    bias: bool, dtype: torch.dtype
) -> None:
    theirs: Any = quantize_linear(linear(bias=bias, dtype=dtype), "int8", CPU)
    weight = theirs.weight.data.float() * theirs.weight.SCB[:, None] / 127
    ours = pack_linear(theirs)
    assert isinstance(ours, Int8Linear)
    x = torch.randn(2, 7, 128).to(dtype)
    x[0, 0, 5] = 80.0  # an outlier, as large models have them
    x[1, 1] = 0.0
    wanted = nn.functional.linear(
        x.float(), weight, theirs.bias if theirs.bias is None else theirs.bias.float()
    )
    found = ours(x)
    assert (found.shape, found.dtype) == ((2, 7, 96), dtype)
    tolerance = 0.01 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)
    for rows in (1, 3):  # a row's products do not depend on its neighbours
        assert torch.equal(ours(x[0, :rows]), found[0, :rows])


def test_packing_leaves_other_quantized_layers_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_chat.model.linear.packed.has_integer_dots", lambda: False)
    model = nn.Sequential(quantize_linear(linear(), "int8", CPU), linear(96, 8))
    pack_linears(model)
    kept = "PackedLinear" if has_bfloat16() else "Linear"
    assert [type(layer).__name__ for layer in model] == ["Linear8bitLt", kept]
    assert model(torch.randn(3, 128).to(DTYPE)).isfinite().all()


@pytest.mark.parametrize("quant", ["none", *QUANTS])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_heads_guess_alike_in_each_quantization(quant: Quant, own: bool, layers: int) -> None:
    backbone = Backbone(random_model(SHAPE, quant="none", dtype=DTYPE, device=CPU))
    hidden = torch.randn(4, SHAPE.hidden).to(DTYPE)
    plain = random_heads(SHAPE, 3, own, layers=layers, dtype=DTYPE)
    plain.weight.mul_(5)
    features, logits = plain.features(hidden), plain.logits(hidden, backbone.lm_head)
    made: Heads = decoding_heads(plain, quant, CPU, DTYPE, backbone.lm_head)
    assert not isinstance(made, NativeHeads)
    assert (made.heads, made.layers) == (3, layers)
    with torch.inference_mode():
        assert made.features(hidden[:1]).shape == (3, 1, SHAPE.hidden)
        found = made.logits(hidden, backbone.lm_head)
    near = 0.999 if quant in ("none", "int8") else 0.98
    assert (
        nn.functional.cosine_similarity(
            made.features(hidden).float(), features.float(), dim=-1
        ).min()
        > near
    )
    assert nn.functional.cosine_similarity(found.float(), logits.float(), dim=-1).min() > near
    if isinstance(made, LinearHeads):  # the 16-bit stacks are freed
        assert plain.lm_heads is None
        assert not list(plain.parameters())
        large = [
            name for name, p in made.named_parameters() if p.is_floating_point() and p.dim() > 1
        ]
        assert large == []
        assert (made.lm_head is not None) == (quant != "none" and not own)


def test_heads_that_share_the_lm_head_guess_with_a_quantized_copy() -> None:
    """The backbone verifies with its own 16-bit LM head, tied or not."""
    engine = bundled("none", "nf4")
    heads = engine.runner.heads
    assert isinstance(heads, LinearHeads)
    assert type(heads.lm_head).__name__ == "Linear4bit"
    assert not hasattr(getattr(engine.backbone.lm_head, "weight", None), "quant_state")
    assert reply(engine, PROMPT, max_new_tokens=12) == reply(bundled(), PROMPT, max_new_tokens=12)


def test_settings_are_never_bitsandbytes_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quantization_config("nf4-double", torch.float16)
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_compute_dtype) == ("nf4", torch.float16)
    assert settings.bnb_4bit_use_double_quant
    assert quantization_config("none", DTYPE) is quantization_config("auto", DTYPE) is None
    for capability, wanted in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _device, found=capability: found
        )
        assert compute_dtype(torch.device("cuda"), torch.bfloat16) == wanted
    assert compute_dtype(CPU, torch.float32) == torch.float32
    layer: Any = bitsandbytes.nn.Linear4bit(
        64, 32, compute_dtype=torch.float32, quant_type="nf4"
    ).to("cpu")
    prepare_4bit(
        nn.Sequential(layer), CPU, torch.bfloat16
    )  # as a checkpoint with the default comes
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quant", QUANTS)
def test_quantized_checkpoints_are_recognized(quant: str, tmp_path: Path) -> None:
    spec = ModelSpec(
        "tiny",
        str(
            save_model(
                tmp_path / "plain", random_model(SHAPE, quant="none", dtype=DTYPE, device=CPU)
            )
        ),
    )
    model, tokenizer = load_pretrained(spec, DTYPE, quant)
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    own = str(tmp_path / "own")
    loaded = load_model(ModelSpec("own", own), ON_CPU)
    assert quant_of(loaded.backbone.config) == quant
    other = load_model(ModelSpec("tiny", spec.backbone, quant=quant), ON_CPU)
    text = torch.arange(12)
    theirs, ours = (each.backbone.hidden_of_text(text).float() for each in (loaded, other))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    for asked in {"none", "nf4", "nf4-double", "int8"} - {quant}:
        with pytest.raises(
            UserError, match=f"the files of own are quantized already, in {quant}: leave --quant"
        ):
            load_model(ModelSpec("own", own, quant=asked), ON_CPU)


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_a_method_whose_package_is_missing(method: str, package: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, random_model(SHAPE, quant="none", dtype=DTYPE, device=CPU))
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=f"are quantized in {method}, which needs: pip install {package}"
    ):
        load_model(ModelSpec("tiny", str(folder)), ON_CPU)
    with pytest.raises(UserError, match="quant is auto, none, nf4, nf4-double, int8, not 'fp4'"):
        load_pretrained(ModelSpec("bundled", str(medusa_chat.config.BUNDLED)), DTYPE, "fp4")


def test_the_peer_is_quantized_alike() -> None:
    for quant in ("nf4", "int8"):
        engine = bundled(quant)
        peer = TransformersPeer(engine)
        assert quant_of(peer.model.config) == quant
        ids = engine.encode(PROMPT)
        assert peer.generate(ids, 12) == reply(
            engine, ids, mode="vanilla", temperature=0, max_new_tokens=12
        )


def test_a_wrong_token_of_a_quantized_model_is_a_fault() -> None:
    engine = bundled("nf4")
    ids = engine.encode(PROMPT)
    right = reply(engine, ids, mode="vanilla", temperature=0, max_new_tokens=4)
    for how in (Sampling(), Sampling(mode="exact", temperature=0.7, top_p=0.9)):
        comparison = Comparison("wrong")
        comparison.add(engine, ids, right, [right[0], (right[1] + 1) % 4096], how)
        assert (comparison.faults, comparison.near_ties) == (1, 0)


def test_a_token_at_the_edge_of_top_p_may_be_in_or_out() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    share = logits.softmax(-1)[0]
    at_edge = Sampling(mode="exact", temperature=1.0, top_p=float(share[:2].sum()))
    assert near_ties.at_an_edge(logits, 2, at_edge, 0.01)
    assert not near_ties.at_an_edge(logits, 0, at_edge, 0.01)
    assert not near_ties.at_an_edge(logits, 2, Sampling(mode="exact", temperature=1.0), 0.01)


def test_training_heads_are_left_as_they_were() -> None:
    heads = MedusaHeads(2, 1, 64, 128)
    assert {name for name, _ in heads.named_parameters()} == {"weight", "bias", "lm_heads"}
    assert decoding_heads(heads, "none", CPU, torch.float32, None) is heads


def test_the_cost_of_steps_is_reported_for_a_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place = Path(__file__).parent.parent / "benchmarks" / "step_cost.py"
    spec = importlib.util.spec_from_file_location("step_cost", place)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setitem(script.SHAPES, "tiny", SHAPE)
    monkeypatch.setattr(
        "sys.argv", ["step_cost", "tiny", "nf4:int8", "none", "--rounds", "1", "--length", "20"]
    )
    script.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["model"], told["heads"], told["own_lm_heads"]) == ("tiny", 5, True)
    for quant in ("nf4:int8", "none"):
        assert list(told["step_ms"][quant]) == ["1", "4", "8", "16", "32", "64"]
        assert all(value > 0 for value in told["step_ms"][quant].values())


@pytest.mark.skipif(
    not (Path("/proc/self/maps").exists() and has_bfloat16()), reason="nothing is packed here"
)
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_no_weight_keeps_its_file_in_memory(quant: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, random_model(SHAPE, quant="none", dtype=DTYPE, device=CPU))
    loaded = load_model(ModelSpec("tiny", str(folder), quant=quant), ON_CPU)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert loaded.backbone.hidden_of_text(torch.arange(4)).isfinite().all()


def test_a_peer_of_an_int8_engine_multiplies_as_the_engine_does() -> None:
    """On a CPU bitsandbytes' own int8 layers cut activations to 8 bits."""
    engine = bundled("int8")
    theirs: Any = TransformersPeer(engine).model
    text = torch.arange(40)
    with torch.inference_mode():
        found = theirs(text[None]).logits[0]
        torch.testing.assert_close(
            found, engine.backbone.logits(engine.backbone.hidden_of_text(text)), rtol=0, atol=1
        )
        assert type(theirs.model.layers[0].mlp.down_proj) is type(
            engine.backbone.model.model.layers[0].mlp.down_proj
        )


def test_noise_explains_no_more_than_sixteen_bits_do() -> None:
    backbone = bundled("nf4").backbone
    unit = torch.finfo(torch.bfloat16).eps * 20
    assert near_ties.explained_gap(backbone, 1e9, 20.0) == pytest.approx(near_ties.ULPS * unit)
    assert near_ties.explained_gap(backbone, 0.1, 20.0) == pytest.approx(
        max(near_ties.NOISE_FACTOR * 0.1, 2 * unit), rel=0.3
    )
    noise = near_ties.row_noise(backbone, list(range(5, 60)))
    assert 0 <= noise < unit
