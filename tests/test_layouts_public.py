"""Heads of every public layout are read by their tensors, whatever the config claims."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa_chat.config import LoadOptions, ModelSpec, UserError
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import HEAD_FILES, ReadHeads, find_heads, read_heads
from medusa_chat.model.loading import heads_file, load_model
from tests.helpers.complaints import refusal
from tests.helpers.public_layouts import (
    BLOCKS,
    logits_of,
    put,
    put_shards,
    settings,
    tensors_of,
    with_heads,
)
from tests.helpers.tiny import random_backbone, random_heads, random_model, save_model

H, V = 32, 64
FLOAT32 = LoadOptions(device="cpu", dtype="float32", engine="torch")
BACKBONE = random_backbone()
LM_HEAD = BACKBONE.lm_head.weight.detach()
OTHER_THINGS = {"model.embed_tokens.weight": torch.ones(V, H), "lm_head.weight": LM_HEAD.clone()}
Q = {"model.layers.0.self_attn.q_proj.weight": torch.ones(H, H)}


def made(heads: int = 3, layers: int = 1, own: bool = True, biases: bool = True) -> MedusaHeads:
    random = random_heads(BACKBONE, heads, layers, own)
    if not biases:
        random.bias.zero_()
    return random


def read(path: Path, **named: Any) -> ReadHeads:
    return read_heads(path, H, V, **named)


def same(found: ReadHeads, heads: MedusaHeads) -> bool:
    return torch.equal(logits_of(found.heads, LM_HEAD), logits_of(heads, LM_HEAD))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("layout", BLOCKS)
def test_every_layout(tmp_path: Path, layout: str, layers: int, own: bool, biases: bool) -> None:
    heads = made(3, layers, own, biases)
    beside = {} if layout in ("official", "vllm") else OTHER_THINGS
    for suffix in (".safetensors", ".pt"):
        found = read(put(tensors_of(heads, layout, biases) | beside, tmp_path / f"heads{suffix}"))
        assert (found.heads.heads, found.heads.layers) == (3, layers)
        assert (found.heads.lm_heads is not None) is own
        assert found.layout == (
            {True: "v0.1", False: "v2"}[own] if layout == "official" else layout
        )
        assert len(found.notices) == (0 if biases else 1)
        assert same(found, heads)


def test_old_pickles_and_number_formats(tmp_path: Path) -> None:
    heads = made()
    torch.save(
        tensors_of(heads, "official"), tmp_path / "a.pt", _use_new_zipfile_serialization=False
    )
    assert same(read(tmp_path / "a.pt"), heads)
    half = {name: t.to(torch.bfloat16) for name, t in tensors_of(heads, "official").items()}
    file = put(half, tmp_path / "b.safetensors")
    assert read(file).heads.weight.dtype == torch.bfloat16
    assert lm_heads_of(read(file)).dtype == torch.bfloat16
    assert read(file, dtype=torch.float32).heads.weight.dtype == torch.float32
    mixed = half | {"0.0.linear.bias": torch.zeros(H)}
    assert read(put(mixed, tmp_path / "c.safetensors")).heads.weight.dtype == torch.float32
    with pytest.raises(UserError, match=r"0.0.linear.weight holds numbers too large for float16"):
        read(put(half | {"0.0.linear.weight": torch.full((H, H), 1e6)}, file), dtype=torch.float16)


def lm_heads_of(found: ReadHeads) -> Tensor:
    assert found.heads.lm_heads is not None
    return found.heads.lm_heads


# ---- whole models ----


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", ["v1.0", "modelopt"])
def test_whole_models_of_one_file_and_of_shards(tmp_path: Path, layout: str, suffix: str) -> None:
    heads = made(layers=2)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    tensors = tensors_of(heads, layout)
    one = put(OTHER_THINGS | tensors, tmp_path / "one" / f"{stem}{suffix}")
    assert find_heads(one.parent) == one
    assert same(read(one), heads)
    half = len(tensors) // 2
    shards = [
        OTHER_THINGS,
        dict(list(tensors.items())[:half]) | Q,
        dict(list(tensors.items())[half:]),
    ]
    index = put_shards(shards, tmp_path / "many", stem, suffix)
    assert find_heads(index.parent) == index
    # Only the heads' shards are opened.
    (index.parent / f"{stem}-00001-of-00003{suffix}").unlink()
    assert same(read(index), heads)
    assert read(index).layout == layout
    (index.parent / f"{stem}-00003-of-00003{suffix}").unlink()
    with pytest.raises(UserError, match=r"cannot read .*-00003-of-00003.*No such file"):
        read(index)


def test_adapters_of_peft(tmp_path: Path) -> None:
    heads = made(layers=2)
    saved, raw = {}, {}
    for name, tensor in tensors_of(heads, "v1.0").items():
        module, head, rest = name.split(".", 2)
        saved[f"base_model.model.{name}"] = tensor
        raw[f"base_model.model.{module}.{head}.modules_to_save.default.{rest}"] = tensor
        raw[f"base_model.model.{module}.{head}.original_module.{rest}"] = torch.zeros_like(tensor)
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, H)}
    file = put(saved | lora, tmp_path / "adapter_model.safetensors")
    assert find_heads(tmp_path) == file
    found = read(file)
    assert same(found, heads)
    assert found.notices == (
        "an adapter's tensors (1) are left out: the heads were trained with it on",
    )
    found = read(put(raw, tmp_path / "raw.safetensors"))
    assert same(found, heads)
    assert found.notices == ("tensors that training replaced (15 original_module) are left out",)
    twice = saved | {"medusa_head.0.0.linear.bias": torch.zeros(H)}
    with pytest.raises(
        UserError, match=r"medusa_head.0.0.linear.bias .*are the same tensor of a head"
    ):
        read(put(twice, tmp_path / "twice.safetensors"))


def test_backbones_with_heads_load_in_silence_and_other_weights_are_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path, random_model(vocabulary=260))
    heads = random_heads(random_backbone(vocabulary=260), 3)
    file = with_heads(folder, heads)
    capfd.readouterr()
    loaded = load_model(ModelSpec("tiny", str(folder)), FLOAT32)
    assert (loaded.notices, capfd.readouterr()) == ((), ("", ""))
    assert loaded.accuracy == folder / "head_accuracy.json"
    assert isinstance(loaded.heads, MedusaHeads)
    assert torch.equal(loaded.heads.weight, heads.weight)
    save_file(
        load_file(file) | {"model.strange": torch.zeros(1), "zoo": torch.zeros(1)},
        file,
        {"format": "pt"},
    )
    loaded = load_model(ModelSpec("tiny", str(folder), layout="vllm"), FLOAT32)
    assert [line.removeprefix(str(folder)) for line in loaded.notices] == [
        " holds weights that the model has no place for: model.strange and 1 more",
        "the heads were expected in the layout vllm, and are in v1.0",
    ]


# ---- vLLM ----


def test_vllm_prefix_and_config(tmp_path: Path) -> None:
    heads = made()
    tensors = {f"medusa_heads.{name}": tensor for name, tensor in tensors_of(heads, "vllm").items()}
    file = put(tensors, tmp_path / "model.safetensors")
    settings(tmp_path, model_type="medusa", num_heads=3, num_hidden_layers=1, medusa_fc_bias=True)
    assert find_heads(tmp_path) == file
    assert same(read(file), heads)
    assert read(file).notices == ()
    settings(tmp_path, model_type="medusa", num_heads=5, num_hidden_layers=2, original_lm_head=True)
    assert len(read(file).notices) == 3


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "lm_heads.0.weight", "medusa_heads.lm_head.weight"]
)
def test_vllm_with_one_lm_head_for_all(tmp_path: Path, name: str) -> None:
    heads = made(own=False)
    file = put(tensors_of(heads, "vllm") | {name: LM_HEAD.clone()}, tmp_path / "model.safetensors")
    found = read(file, lm_head=LM_HEAD.to(torch.bfloat16))
    assert (found.heads.lm_heads, found.notices) == (None, ())
    assert same(found, heads)
    assert read(file).heads.lm_heads is None
    assert "cannot be compared" in read(file).notices[0]
    other = read(file, lm_head=LM_HEAD + 0.1)
    assert "is not the backbone's LM head" in other.notices[0]
    assert torch.equal(lm_heads_of(other), LM_HEAD.expand(3, -1, -1))


@pytest.mark.parametrize("rows", [40, V])
@pytest.mark.parametrize("own", [True, False])
def test_vllm_with_a_truncated_vocabulary(tmp_path: Path, own: bool, rows: int) -> None:
    heads = made(own=own)
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(1))[:40]
    tensors = tensors_of(heads, "vllm") | ({} if own else {"lm_head.weight": LM_HEAD.clone()})
    large = {n: t * 1e6 if n.startswith("lm_head") else t for n, t in tensors.items()}
    file = put(large | {"token_map": ids}, tmp_path / "large.safetensors")
    with pytest.raises(UserError, match="too large for float16"):
        read(file, dtype=torch.float16, lm_head=LM_HEAD)
    for name in [name for name in tensors if name.startswith("lm_head")]:
        tensors[name] = tensors[name][ids].clone() if rows == 40 else tensors[name]
    file = put(tensors | {"token_map": ids}, tmp_path / "model.safetensors")
    settings(tmp_path, model_type="medusa", num_heads=3, vocab_size=V, truncated_vocab_size=40)
    found = read(file, lm_head=LM_HEAD)
    assert found.notices == (f"the heads know 40 of {V} tokens and guess no others",)
    assert found.heads.vocabulary is not None
    assert found.heads.vocabulary.tokens.tolist() == sorted(ids.tolist())
    assert (found.heads.lm_heads is not None) is own
    hidden = torch.randn(5, H, generator=torch.Generator().manual_seed(4))
    logits, whole = (each.logits(hidden, BACKBONE.lm_head) for each in (found.heads, heads))
    torch.testing.assert_close(logits, whole[..., found.heads.vocabulary.tokens])
    if not own:
        other = read(file, lm_head=LM_HEAD + 0.1)
        assert "is not the backbone's LM head" in other.notices[1]
        assert torch.equal(lm_heads_of(other)[2], LM_HEAD[found.heads.vocabulary.tokens])
    every = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    mixed = tensors_of(heads, "vllm") | ({} if own else {"lm_head.weight": LM_HEAD.clone()})
    mixed = {n: t[every] if n.startswith("lm_head") else t for n, t in mixed.items()}
    found = read(put(mixed | {"token_map": every}, tmp_path / "all.safetensors"), lm_head=LM_HEAD)
    assert (found.heads.vocabulary, found.notices) == (None, ())
    assert same(found, heads)
    for wrong in (
        *([ids[:39]] if rows == 40 else []),
        ids.clone().fill_(3),
        ids + V,
        ids.float(),
        ids[None],
    ):
        with pytest.raises(UserError, match="token_map"):
            read(put(tensors | {"token_map": wrong.clone()}, tmp_path / "b.safetensors"))


# ---- sizes and configs ----


@pytest.mark.parametrize(("rows", "vocabulary"), [(64, 61), (61, 64), (60, 64)])
def test_vocabularies_that_differ_by_padding(tmp_path: Path, rows: int, vocabulary: int) -> None:
    heads = random_heads(random_backbone(vocabulary=rows), 2)
    found = read_heads(
        put(tensors_of(heads, "official"), tmp_path / "a.safetensors"), H, vocabulary
    )
    assert found.notices == (
        f"the heads have {rows} rows for {vocabulary} tokens, taken for padding",
    )
    common = min(rows, vocabulary)
    logits = logits_of(found.heads, LM_HEAD)
    assert logits.shape == (2, 5, vocabulary)
    assert torch.equal(logits[..., :common], logits_of(heads, LM_HEAD)[..., :common])
    assert (logits.argmax(-1) < common).all()


@pytest.mark.parametrize("rows", [1, 32, 63 + 8, 96])
def test_other_vocabularies_are_refused(tmp_path: Path, rows: int) -> None:
    heads = MedusaHeads(2, 1, H, rows).requires_grad_(False)
    with pytest.raises(
        UserError, match=rf"has shape \[{rows}, 32\], the backbone needs \[64, 32\]"
    ):
        read(put(tensors_of(heads, "official"), tmp_path / "a.safetensors"))


def test_configs_that_contradict_are_reported_and_not_used(tmp_path: Path) -> None:
    """The published v0.1 configs claim 2 heads; their files hold 5."""
    heads = made(5)
    file = put(tensors_of(heads, "official"), tmp_path / "medusa_lm_head.pt")
    config = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
    }
    settings(tmp_path, **config)
    (notice,) = read(file).notices
    assert notice.endswith(
        "config.json claims 2 heads, but the tensors hold 5; the tensors are used"
    )
    settings(tmp_path, **config | {"medusa_num_heads": 5, "version": "2"})
    assert "heads that share an LM head, but the tensors hold none" in read(file).notices[0]
    settings(tmp_path, medusa={"num_medusa_heads": 5, "num_medusa_layers": 3})
    assert "3 layers, but the tensors hold 1" in read(file).notices[0]
    (tmp_path / "config.json").write_text("{")
    assert "cannot read" in read(file).notices[0]
    (tmp_path / "config.json").unlink()
    for expected in ("v0.1", "tgi", "tensorrt-llm", ""):
        assert read(file, layout=expected).notices == ()
    assert "expected in the layout v2" in read(file, layout="v2").notices[0]
    with pytest.raises(UserError, match=r"unknown layout 'gguf' of heads; there are v0\.1, v2"):
        read(file, layout="gguf")


# ---- what is refused ----


class Bomb:
    """Runs a command when a pickle of it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def refused(path: Path, **named: Any) -> str:
    message = refusal(read, path, **named)
    assert str(path.parent) in message
    return message


def test_pickles_that_are_more_than_tensors(tmp_path: Path) -> None:
    import pickle
    import zipfile

    mark, tensors = tmp_path / "mark", tensors_of(made(), "official")
    for name, zipped in (("zip.pt", True), ("old.pt", False)):
        torch.save(
            tensors | {"x": Bomb(mark)}, tmp_path / name, _use_new_zipfile_serialization=zipped
        )
        assert "it calls " in refused(tmp_path / name)
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(Bomb(mark), file)
    assert "only pickles of tensors alone are opened" in refused(tmp_path / "plain.pt")
    assert not mark.exists()
    whole = put(tensors, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    assert "compressed" in refused(tmp_path / "small.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    assert "it holds a list, not tensors by name" in refused(tmp_path / "list.pt")
    for odd in (torch.eye(H).to_sparse(), torch.empty(H, H, device="meta")):
        torch.save(tensors | {"0.0.linear.weight": odd}, tmp_path / "odd.pt")
        assert "no plain one" in refused(tmp_path / "odd.pt")
    torch.save(tensors | {"epoch": 3}, tmp_path / "more.pt")
    assert "'epoch' is a int, not a tensor" in refused(tmp_path / "more.pt")


def test_damaged_pickles_and_indexes(tmp_path: Path) -> None:
    whole = put(tensors_of(made(), "official"), tmp_path / "whole.pt").read_bytes()
    damages = {
        "short": whole[:-90],
        "head": whole[:300],
        "empty": b"",
        "noise": b"\x00\xff" * 500,
        "text": b"version https:",
    }
    for name, content in damages.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        assert "cannot read" in refused(tmp_path / f"{name}.pt")
    assert "No such file" in refused(tmp_path / "absent.pt")
    index = tmp_path / "model.safetensors.index.json"
    for text, complaint in (
        ("", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        (
            '{"weight_map": {"medusa_head.0.0.linear.weight": "../whole.pt"}}',
            "no file of its folder",
        ),
        (
            '{"weight_map": {"medusa_head.0.0.linear.weight": "whole.pt"}}',
            "that model.safetensors.index.json places",
        ),
        ('{"weight_map": {"medusa_head.0.0.linear.weight": "absent.safetensors"}}', "No such file"),
    ):
        index.write_text(text)
        assert complaint in refused(index)


@pytest.mark.parametrize(
    ("layout", "change", "complaint"),
    [
        ("official", {"2.1.weight": None}, "tensor 2.1.weight is missing"),
        (
            "official",
            {"1.0.linear.weight": torch.full((H, H), float("nan"))},
            "1.0.linear.weight holds NaN or infinity",
        ),
        (
            "official",
            {"1.0.linear.bias": torch.full((H,), float("inf"))},
            "1.0.linear.bias holds NaN or infinity",
        ),
        (
            "official",
            {"1.1.weight": torch.full((V, H), float("-inf"))},
            "1.1.weight holds NaN or infinity",
        ),
        ("official", {"1.1.weight": torch.zeros(V, H, dtype=torch.int8)}, "1.1.weight holds int8"),
        (
            "official",
            {"1.0.linear.weight": torch.zeros(H, H).to(torch.float8_e4m3fn)},
            "holds float8_e4m3fn",
        ),
        ("official", {"1.1.weight": torch.zeros(V)}, r"1.1.weight has shape \[64\]"),
        (
            "official",
            {"medusa_head.0.0.linear.weight": torch.zeros(H, H)},
            "they are of two layouts of heads",
        ),
        ("official", {"lm_head.weight": torch.zeros(V, H)}, "unknown tensor 'lm_head.weight'"),
        (
            "official",
            {"hydra_lm_head.0.weight": torch.zeros(1)},
            "unknown tensor 'hydra_lm_head.0.weight'",
        ),
        ("v1.0", {"medusa_head.2.1.weight": None}, "tensor medusa_head.2.1.weight is missing"),
        (
            "v1.0",
            {"medusa_head.1.0.linear.weight": None},
            "tensor medusa_head.1.0.linear.weight is missing",
        ),
        (
            "v1.0",
            {"medusa_head.1.0.linear.scale": torch.zeros(1)},
            "unknown tensor 'medusa_head.1.0.linear.scale'",
        ),
        (
            "modelopt",
            {"medusa_heads.0.0.linear.weight_scale": torch.zeros(1)},
            "unknown tensor .*weight_scale'",
        ),
        (
            "tensorrt-llm engine",
            {"medusa_heads.1.lm_head.weight": None},
            "medusa_heads.1.lm_head.weight is missing",
        ),
        ("vllm", {"lm_heads.1.weight": None}, "tensor lm_heads.1.weight is missing"),
        (
            "vllm",
            {"lm_heads.7.weight": torch.zeros(V, H)},
            "LM head lm_heads.7.weight belongs to no head",
        ),
        (
            "vllm",
            {"blocks.1.layers.0.scale": torch.zeros(1)},
            "unknown tensor 'blocks.1.layers.0.scale'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, layout: str, change: Any, complaint: str
) -> None:
    tensors = tensors_of(made(), layout) | change
    file = put(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match=complaint) as raised:
        read(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_without_heads_or_with_them_in_parts(tmp_path: Path) -> None:
    assert find_heads(tmp_path) is None
    put(OTHER_THINGS, tmp_path / "model.safetensors")
    assert find_heads(tmp_path) is None
    with pytest.raises(UserError, match="there are no Medusa heads in"):
        heads_file(ModelSpec("tiny", str(tmp_path), heads=str(tmp_path)))
    assert "holds no Medusa heads: 'lm_head.weight' is no tensor of a head" in refused(
        tmp_path / "model.safetensors"
    )
    (tmp_path / "model.safetensors").unlink()
    for rank in (0, 1):
        file = put(tensors_of(made(), "tensorrt-llm engine"), tmp_path / f"rank{rank}.safetensors")
    with pytest.raises(UserError, match="split over several GPUs"):
        find_heads(tmp_path)
    file.unlink()
    assert find_heads(tmp_path) == tmp_path / "rank0.safetensors"
    put(tensors_of(made(), "official"), tmp_path / "medusa_lm_head.pt")
    assert find_heads(tmp_path) == tmp_path / "medusa_lm_head.pt"  # heads alone come first
    assert {"medusa_lm_head.pt", "model.safetensors", "rank0.safetensors"} <= set(HEAD_FILES)


# ---- memory ----

PEAK = """
import sys, torch
from pathlib import Path
from medusa_chat.model.layouts import read_heads

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest memory so far
    before = kilobytes("VmRSS")
    heads = read_heads(Path(path), 256, 16384, dtype=torch.bfloat16).heads
    print((kilobytes("VmHWM") - before) * 1024 / sum(p.nbytes for p in heads.parameters()))
    del heads
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of memory"
)
def test_heads_are_never_held_twice(tmp_path: Path) -> None:
    heads = random_heads(random_backbone(vocabulary=16384, hidden_size=256), 12).to(torch.bfloat16)
    files = [
        put(tensors_of(heads, "official"), tmp_path / f"heads{suffix}")
        for suffix in (".safetensors", ".pt")
    ]
    command = [sys.executable, "-c", PEAK, *map(str, files)]
    peaks = [
        float(line)
        for line in subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()
    ]
    assert len(peaks) == 2
    assert max(peaks) < 1.3, peaks  # one of 12 LM heads, and some
