"""Promises about GPUs that a CPU can check: Macs, sorts, memory on the way to a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import medusa_chat
from medusa_chat.commands.device_findings import gpu_facts
from medusa_chat.config import ModelSpec, UserError
from medusa_chat.machine import devices, plans
from medusa_chat.machine.contents import contents_of
from medusa_chat.model import pretrained
from medusa_chat.model.attention import rule
from medusa_chat.model.attention.tree_attention import torch_attention
from medusa_chat.model.backbone import Backbone
from tests.helpers.tiny import (
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    random_model,
    reply,
    save_model,
)

if TYPE_CHECKING:
    from pathlib import Path


class Mac(TorchDispatchMode):
    """Refuses what MPS has not: float64 anywhere, and products of integer matrices."""

    products = ("mm", "bmm", "addmm", "baddbmm")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves([args, kwargs, made]) if torch.is_tensor(leaf)]
        name = function.name()
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            raise TypeError(f"{name}: MPS has no float64")
        product = name.split("::")[1].split(".")[0] in self.products
        if product and not tensors[0].is_floating_point():
            raise TypeError(f"{name}: MPS multiplies no integer matrices")
        return made


@pytest.mark.parametrize("tree", ["chain-2", "static-12", "dynamic-8"])
def test_a_mac_decodes_in_every_mode(tree: str) -> None:
    backbone = random_backbone("llama")
    own, mac = (
        make_engine(backbone, random_heads(backbone), tree, copies=True, eager=True)
        for _ in range(2)
    )
    modes: list[dict[str, Any]] = [
        {},
        {"mode": "vanilla"},
        {"mode": "typical", "top_p": 0.9},
        {"mode": "exact", "top_k": 9, "min_p": 0.01, "seed": 2**32 - 1},
    ]
    for settings in modes:
        expected = reply(own, prompt_ids(9) * 2, max_new_tokens=12, **settings)
        with Mac():  # type: ignore[no-untyped-call]
            assert reply(mac, prompt_ids(9) * 2, max_new_tokens=12, **settings) == expected


def test_a_full_gpu_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_backbone: Backbone) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Backbone, "_logits_of_tree", full)
    with pytest.raises(torch.OutOfMemoryError):
        random_backbone("llama")
    monkeypatch.setattr(Backbone, "_logits_of_tree", lambda _: [][0])
    with pytest.raises(UserError, match="do not take tree attention"):
        random_backbone("llama")


def test_weights_on_their_way_to_a_gpu_are_not_copied_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay as they are mapped from the files, and change their number format on the device."""
    save_model(tmp_path, random_model("llama", 320).half())
    asked = []
    load = pretrained.load_weights

    def noted(folder: Path, **settings: Any) -> Any:
        asked.append(settings["dtype"])
        return load(folder, **settings)

    monkeypatch.setattr(pretrained, "load_weights", noted)
    monkeypatch.setattr(pretrained, "check_tables", lambda *_: None)  # reads values
    spec = ModelSpec("tiny", str(tmp_path))
    gpu = torch.device("meta")  # has shapes and formats
    model, _ = pretrained.load_pretrained(spec, torch.bfloat16, "none", gpu)
    assert asked == ["auto"]
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.base_model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("kind", "warned"), [("gemma2", True), ("llama", False)])
def test_gemma_in_float16_is_warned_of(kind: str, warned: bool, tmp_path: Path) -> None:
    """A GPU before Ampere computes in it by default."""
    save_model(tmp_path, random_model(kind, 320))
    engine = medusa_chat.load(str(tmp_path), device="cpu", dtype="float16", engine="torch")
    assert any("overflow in float16" in notice for notice in engine.notices) is warned


# ---- what doctor and the memory plan say ----


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as doctor looks at it."""
    # It is imported where torch has CUDA.
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    ops = pytest.importorskip("bitsandbytes.backends.cuda.ops")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(ops, "_gpu_dispatch_props", lambda _index: (132, 9, 0))
    monkeypatch.setattr(rule, "kernel_for", lambda _device: torch_attention)
    monkeypatch.setattr(rule, "check", lambda *_: None)
    ops._gemm_4bit_use_custom_cuda.cache_clear()


@pytest.mark.usefixtures("h100")
def test_doctor_says_how_a_gpu_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {subject: text for subject, text, _ in gpu_facts("cuda:0", torch.bfloat16)}
    assert facts["attention"].startswith("Triton in recorded steps; that of cuDNN is off")
    assert "1, 8, 16, 32, 64" in facts["recorded"]
    assert facts["4-bit rows"].endswith("qkv 32, o 7, gate-up 48, down 5")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    faults = [text for _, text, fault in gpu_facts("cuda:0", torch.bfloat16) if fault]
    assert faults == ["none, which Triton needs: install gcc, or set CC"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "Gemma" in dict(fact[:2] for fact in gpu_facts("cuda:0", torch.float16))["numbers"]


def test_a_gpus_plan_counts_recorded_steps_and_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of(ModelSpec("a", "nobody/nothing", shape="llama-8b"))
    assert contents is not None
    nf4 = plans.Load("cuda", "nf4", "nf4")
    monkeypatch.setattr(plans, "maps_memory", lambda: True)
    parts = plans.plan(contents, nf4).parts()
    vocabulary = contents.shape.vocabulary
    # The logits of all numbers of rows, and 64 rows of a sort with its places.
    assert parts["graphs"] > 121 * vocabulary * 2 + 64 * vocabulary * (4 + 8)
    assert parts["holes"] == 0
    assert plans.plan(contents, plans.Load("cpu", "nf4", "nf4")).graphs == 0
    monkeypatch.setattr(plans, "maps_memory", lambda: False)
    assert 0.5e9 < plans.plan(contents, nf4).holes < 0.9e9


def test_a_users_own_setting_of_the_allocator_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", given.append)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    devices.prepare_allocator(torch.device("cpu"))
    assert not given
    devices.prepare_allocator(torch.device("cuda"))
    assert given == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    devices.prepare_allocator(torch.device("cuda"))
    assert len(given) == 1
    assert not devices.maps_memory()
