"""The Triton kernel of tree attention without a GPU: interpreted, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medusa_chat.model.attention import rule
from medusa_chat.model.attention.rule import TORCH, TRITON, Shape, check, choose_attention
from medusa_chat.model.attention.tree_attention import TreeMask, torch_attention


def test_the_kernel_equals_the_reference_in_the_interpreter() -> None:
    pytest.importorskip(
        "triton", minversion="3.7", reason="before, Triton's interpreter fails with NumPy 2.4"
    )
    file = Path(__file__).parent / "helpers" / "interpreted_kernel.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


class CompileOnly:
    """A kernel of Triton whose launch only compiles it, for a GPU that need not be here."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: self.compiled.append(
            self.kernel.warmup(*arguments, grid=grid, **named)
        )


def compiling(
    module: Any,
    names: tuple[str, ...],
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> dict[str, CompileOnly]:
    """Make a module's kernels compile for a GPU that is not here, and not run."""
    triton = pytest.importorskip("triton", reason="Triton is not there on this platform")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    device = 1000 + capability  # kernels are kept by its number
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: device,
        get_current_stream=lambda _device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    kernels = {name: CompileOnly(getattr(module, name)) for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(module, name, kernel)
    return kernels


NOT_COMPILED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a program may take


@pytest.mark.skipif(NOT_COMPILED, reason="nothing is compiled in the interpreter")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("capability", "number", "size", "rows", "window", "softcap"),
    [
        (80, torch.bfloat16, 128, 64, None, None),
        (86, torch.float16, 96, 1, None, None),
        (89, torch.bfloat16, 256, 32, 4096, 50.0),
        (90, torch.bfloat16, 128, 64, 4096, None),
        (90, torch.float32, 128, 64, None, None),
    ],
    ids=str,
)
def test_the_kernel_compiles_for_gpus_that_are_not_here(
    capability: int,
    number: torch.dtype,
    size: int,
    rows: int,
    window: int | None,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With the arguments of a real call."""
    pytest.importorskip("triton", reason="Triton is not there on this platform")
    from medusa_chat.model.attention import kernel as tree_kernel

    kernels = compiling(tree_kernel, ("_attend_part", "_join"), capability, monkeypatch, tmp_path)
    mask = TreeMask.of(
        torch.eye(rows, dtype=torch.bool),
        torch.arange(rows),
        torch.tensor(0),
        1024,
        number,
        window=window,
    )
    query = torch.zeros(1, 8, rows, size, dtype=number)
    cache = torch.zeros(2, 1, 2, 1024, size, dtype=number)
    tree_kernel.attend(query, cache[0], cache[1], mask, 0.1, softcap, 264)
    (kernel,), (_,) = (kernel.compiled for kernel in kernels.values())
    assert kernel.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert ("mma" in kernel.asm["ptx"]) is (number != torch.float32)  # the fast units, or every bit


@pytest.mark.skipif(NOT_COMPILED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(
    ("capability", "number"), [(75, torch.float16), (90, torch.bfloat16)], ids=str
)
def test_the_operations_of_a_layer_compile_for_gpus_that_are_not_here(
    capability: int, number: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="Triton is not there on this platform")
    from medusa_chat.model.fused import kernels as operations

    names = ("_norm", "_gate", "_rotate")
    kernels = compiling(operations, names, capability, monkeypatch, tmp_path)
    product = torch.zeros(1, 16, 48, 128, dtype=number).transpose(1, 2)
    query, key, value = product.split([32, 8, 8], 1)
    turn = torch.zeros(2, 1, 16, 128, dtype=number)
    cache = torch.zeros(2, 1, 8, 64, 128, dtype=number)
    rows = torch.zeros(1, 16, 8192, dtype=number)
    operations.norm(rows, rows[0, 0], 1e-5, "llama")
    gates, values = rows.chunk(2, -1)
    operations.gate(gates, values, "silu")
    operations.rotate(
        query, (key, value), (turn[0], turn[1]), (cache[0], cache[1], torch.arange(16))
    )
    assert all(kernel.compiled for kernel in kernels.values())


SHAPE = Shape(4, 2, 8, torch.float32, window=9)


def test_a_kernel_that_is_wrong_is_found_at_load() -> None:
    check(torch_attention, SHAPE, torch.device("cpu"))
    with pytest.raises(ArithmeticError, match="off by"):
        check(lambda *inputs: 1.01 * torch_attention(*inputs), SHAPE, torch.device("cpu"))


def cuda_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    """A GPU as far as the rule looks at it, without a check of the kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(rule, "check", lambda *_: None)
    return torch.device("cuda")


def test_the_kernel_attends_from_ampere_on_and_torch_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    assert choose_attention(cuda_of(monkeypatch, (8, 0)), SHAPE).name == TRITON
    older = choose_attention(cuda_of(monkeypatch, (7, 5)), SHAPE)
    assert (older.name, older.attend) == (TORCH, torch_attention)
    assert "8.0" in older.reason
    assert choose_attention(torch.device("cpu"), SHAPE).reason == ""


def fails(*_arguments: Any) -> None:
    raise RuntimeError("no compiler\nfound")


def test_without_a_kernel_that_works_torch_attends_and_the_reason_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = cuda_of(monkeypatch, (9, 0))
    monkeypatch.setattr(rule, "check", fails)
    assert choose_attention(device, SHAPE).reason == "RuntimeError: no compiler"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "medusa_chat.model.attention.kernel", raising=False)
    choice = choose_attention(device, SHAPE)
    assert choice.name == TORCH
    assert "triton" in choice.reason


def test_cudnn_attends_nowhere_as_it_plans_anew_for_each_number_of_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    choose_attention(cuda_of(monkeypatch, (9, 0)), SHAPE)
    assert chosen == [False]
