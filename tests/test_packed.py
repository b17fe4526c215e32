"""Packed linear layers give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medusa_chat.model.linear.packed import PackedLinear, has_bfloat16, pack_linears

needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16(), reason="oneDNN does not compute in bfloat16 here"
)


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 2, 14, 64, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_the_products_are_the_same(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(320, 864, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(1, rows, 320).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=0.02, atol=0.02)


@needs_bfloat16
def test_only_what_gains_is_packed() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8).bfloat16(), nn.Embedding(4, 8).bfloat16()
    )
    pack_linears(model)
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear, nn.Embedding]
    assert not any("weight" in name for name, _ in model[1].named_parameters())
