"""What needs CUDA. Run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import medusa_chat
from medusa_chat.config import Mode, Sampling

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
