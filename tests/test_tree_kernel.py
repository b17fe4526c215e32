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

from medusa_chat.model.attention import choice
from medusa_chat.model.attention.choice import TORCH, FasterAttention
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
    capability: int,
    number: torch.dtype,
    size: int,
    rows: int,
    window: int | None,
    softcap: float | None,
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
        get_current_stream=lambda _device: 0,
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
    query = torch.zeros(1, 8, rows, size, dtype=number)
    cache = torch.zeros(2, 1, 2, 1024, size, dtype=number)
    largest = max(tree_kernel.launches(132), key=lambda launch: launch.stages)
    tree_kernel.attend(query, cache[0], cache[1], mask, 0.1, softcap, largest)
    (kernel,), (_,) = (kernel.compiled for kernel in kernels.values())
    assert kernel.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert ("mma" in kernel.asm["ptx"]) is (number != torch.float32)  # the fast units, or every bit


def fake_kernels(
    monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float], **broken: Any
) -> None:
    """Replace the kernels and their times.

    Each is the reference, or what `broken` has under its name. Broken ones are not timed.
    """
    names = [name for name in milliseconds if name != TORCH]
    timed = [milliseconds[name] for name in [*names, TORCH] if name not in broken]
    times = iter([0.0, *timed])
    kernels = {name: broken.get(name, torch_attention) for name in names}
    monkeypatch.setattr(choice, "kernels", lambda _device: kernels)
    monkeypatch.setattr(choice, "time_in_graph", lambda _call, _device: next(times))


def attend_once(faster: FasterAttention, rows: int = 3, span: int = 32) -> bool:
    """Return whether attention over random numbers equals the reference."""
    ancestors = torch.ones(rows, rows).tril().bool()
    mask = TreeMask.of(ancestors, torch.arange(rows) + 9, torch.tensor(9), span, torch.float32)
    query = torch.randn(1, 4, rows, 8)
    key, value = torch.randn(1, 2, span, 8), torch.randn(1, 2, span, 8)
    ours = faster(query, key, value, mask, 0.3)
    return torch.equal(ours, torch_attention(query, key, value, mask, 0.3))


@pytest.mark.parametrize(("slow", "taken"), [(0.5, "torch"), (2.0, "quick")])
def test_the_faster_one_attends_and_each_shape_is_timed_once(
    slow: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kernels(monkeypatch, {"quick": 1.0, "slower": 3.0, "torch": slow})
    faster = FasterAttention()
    for rows in (3, 16, 5):  # all of one tile of the kernel
        assert attend_once(faster, rows)
    (report,) = faster.report()
    assert report == {
        "rows": 16,
        "span": 32,
        "window": False,
        "taken": taken,
        "failures": {},
        "ms": {"quick": 1.0, "slower": 3.0, "torch": slow},
    }


def test_kernels_that_fail_or_are_wrong_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: Any) -> None:
        raise RuntimeError("no compiler\nfound")

    fake_kernels(
        monkeypatch,
        {"failing": 1.0, "wrong": 1.0, "torch": 9.0},
        failing=fails,
        wrong=lambda *arguments: 1.01 * torch_attention(*arguments),
    )
    faster = FasterAttention()
    assert attend_once(faster)
    (report,) = faster.report()
    assert (report["taken"], report["ms"]) == ("torch", {"torch": 9.0})
    assert report["failures"]["failing"] == "RuntimeError: no compiler found"
    assert "off by" in report["failures"]["wrong"]


def test_without_triton_torch_attends_and_the_reason_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "medusa_chat.model.attention.kernel", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    faster = FasterAttention()
    assert attend_once(faster, 1)
    (report,) = faster.report()
    assert report["taken"] == "torch"
    assert "triton" in report["failures"]["triton"]


def test_torch_attends_on_a_gpu_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    faster = FasterAttention()
    assert attend_once(faster)
    assert "8.0" in faster.report()[0]["failures"]["triton"]
