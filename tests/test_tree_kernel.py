"""The Triton kernel of tree attention without a GPU: right in Triton's interpreter, compiled for the GPUs it is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medusa_chat.model.attention import choice as faster_attention
from medusa_chat.model.attention.choice import FasterAttention
from medusa_chat.model.attention.tree_attention import TreeMask, plain


def test_the_kernel_is_its_twin_in_the_interpreter() -> None:
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
    """Stands in for a kernel of Triton: a launch compiles it for a GPU that need not be here."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: self.compiled.append(
            self.kernel.warmup(*arguments, grid=grid, **named)
        )


SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a program may take


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"
)
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
    capability: Any,
    number: Any,
    size: Any,
    rows: Any,
    window: Any,
    softcap: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With the arguments of a real call, in the launch that takes the most shared memory."""
    triton = pytest.importorskip("triton", reason="Triton is not there on this platform")
    from triton.backends.compiler import GPUTarget

    from medusa_chat.model.attention import kernel as tree_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = 1000 + capability  # kernels are kept by its number
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    kernels = {name: CompileOnly(getattr(tree_kernel, name)) for name in ("_attend_part", "_join")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(tree_kernel, name, kernel)
    mask = TreeMask.of(
        torch.eye(rows, dtype=torch.bool),
        torch.arange(rows),
        torch.tensor(0),
        1024,
        number,
        window=window,
    )
    query, cache = (
        torch.zeros(1, 8, rows, size, dtype=number),
        torch.zeros(2, 1, 2, 1024, size, dtype=number),
    )
    largest = max(tree_kernel.launches(132), key=lambda launch: launch.stages)
    tree_kernel.attend(query, *cache, mask, 0.1, softcap, largest)
    (kernel,), (_,) = (kernel.compiled for kernel in kernels.values())
    assert kernel.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert ("mma" in kernel.asm["ptx"]) is (number != torch.float32)  # the fast units, or every bit


def fake_kernels(
    monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float], **broken: Any
) -> None:
    """Kernels that are the twin, or what `broken` has under their name, and that take so long."""
    ways = {
        name: broken.get(name, plain) for name in milliseconds if name != faster_attention.TORCH
    }
    timed = iter(
        [
            0.0,
            *(milliseconds[name] for name in [*ways, faster_attention.TORCH] if name not in broken),
        ]
    )
    monkeypatch.setattr(faster_attention, "kernels", lambda device: ways)
    monkeypatch.setattr(faster_attention, "_milliseconds", lambda call, device: next(timed))


def attend_once(faster: FasterAttention, rows: int = 3, span: int = 32) -> bool:
    """Whether attention over random numbers is what the twin gives."""
    mask = TreeMask.of(
        torch.ones(rows, rows).tril().bool(),
        torch.arange(rows) + 9,
        torch.tensor(9),
        span,
        torch.float32,
    )
    query, key, value = (
        torch.randn(1, heads, n, 8) for heads, n in ((4, rows), (2, span), (2, span))
    )
    return torch.equal(faster(query, key, value, mask, 0.3), plain(query, key, value, mask, 0.3))


@pytest.mark.parametrize(("slow", "taken"), [(0.5, "torch"), (2.0, "quick")])
def test_the_faster_one_attends_and_each_shape_is_timed_once(
    slow: Any, taken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kernels(monkeypatch, {"quick": 1.0, "slower": 3.0, "torch": slow})
    faster = FasterAttention()
    for rows in (3, 16, 5):  # one tile of the kernel
        assert attend_once(faster, rows)
    (told,) = faster.told()
    assert told == {
        "rows": 16,
        "span": 32,
        "window": False,
        "taken": taken,
        "failures": {},
        "ms": {"quick": 1.0, "slower": 3.0, "torch": slow},
    }


def test_kernels_that_fail_or_are_wrong_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("no compiler\nfound")

    fake_kernels(
        monkeypatch,
        {"failing": 1.0, "wrong": 1.0, "torch": 9.0},
        failing=fails,
        wrong=lambda *arguments: 1.01 * plain(*arguments),
    )
    faster = FasterAttention()
    assert attend_once(faster)
    (told,) = faster.told()
    assert (told["taken"], told["ms"]) == ("torch", {"torch": 9.0})
    assert told["failures"]["failing"] == "RuntimeError: no compiler found"
    assert "off by" in told["failures"]["wrong"]


def test_without_triton_torch_attends_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "medusa_chat.model.attention.kernel", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    faster = FasterAttention()
    assert attend_once(faster, 1)
    (told,) = faster.told()
    assert told["taken"] == "torch"
    assert "triton" in told["failures"]["triton"]


def test_a_gpu_before_ampere_keeps_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    faster = FasterAttention()
    assert attend_once(faster)
    assert "8.0" in faster.told()[0]["failures"]["triton"]
