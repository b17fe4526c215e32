"""What needs CUDA. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import backbone_folder, do, tiny_run

import medusa_chat
from medusa_chat.config import Mode, Sampling
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.training import losses
from medusa_chat.training.data import IGNORED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("mode", ["vanilla", "greedy", "exact"])
def test_the_gpu_says_what_the_cpu_says(mode: Mode) -> None:
    replies = []
    for device in ("cpu", "cuda"):
        engine = medusa_chat.load(device=device, dtype="float32", tree="mc_sim_7b_63")
        sampling = Sampling(mode=mode, max_new_tokens=64, seed=5)
        steps = engine.generate([{"role": "user", "content": "Tell me a fairy tale."}], sampling)
        replies.append([token.id for step in steps for token in step.tokens])
    assert replies[0] == replies[1]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_ligers_kernel_gives_our_loss_and_gradients(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(64, 320, bias=False, device="cuda")
    heads = MedusaHeads(3, 2, 64, 320 if own else None).cuda()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = torch.randn(4, 50, 64, device="cuda")
    labels = torch.randint(0, 320, (4, 50), device="cuda")
    labels[:, :7] = IGNORED
    positions = torch.arange(50, device="cuda").expand(4, 50)
    trained = [*heads.parameters(), lm_head.weight] if not own else list(heads.parameters())
    kernel = losses._liger()
    assert kernel is not None
    found = []
    for chosen in (kernel, None):
        monkeypatch.setattr(losses, "_liger", lambda chosen=chosen: chosen)
        assert (losses._fused(hidden[0], lm_head) is not None) is (chosen is not None)
        total = losses.heads_loss(heads, lm_head, hidden, labels, positions, 0.8).total
        found.append((total, *torch.autograd.grad(total, trained)))
        nothing = torch.full_like(labels, IGNORED)
        assert losses.heads_loss(heads, lm_head, hidden, nothing, positions, 0.8).total == 0
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())


@pytest.mark.parametrize("recipe", ["medusa1", "medusa2", "distilled"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_recipes_run_on_the_gpu(recipe: str, quant: str, tmp_path: Path) -> None:
    backbone_folder(tmp_path / "backbone", hidden_size=64, intermediate_size=128)
    steps, _ = do(tiny_run(tmp_path, "out", recipe, quant=quant, max_steps=30, learning_rate=0.02, batch_size=4))
    assert steps[-1].head_loss[0] < steps[0].head_loss[0]
    engine = medusa_chat.load(
        str(tmp_path / ("backbone" if recipe == "medusa1" else "out")), str(tmp_path / "out"), device="cuda",
        tree="chain-2", probing=False,
    )  # fmt: skip
    drawn = engine.generate([{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=8, ignore_eos=True))
    assert sum(len(step.tokens) for step in drawn) == 8
