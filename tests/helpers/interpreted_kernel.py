"""The Triton kernel against the reference, in Triton's interpreter.

tests/test_tree_kernel.py runs this file in a process of its own: the interpreter has to be chosen
before anything imports triton.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.decoding.graphs import static_step
from medusa_chat.model.attention.kernel import attend
from medusa_chat.model.attention.rule import Choice
from medusa_chat.model.attention.tree_attention import TreeMask, torch_attention
from medusa_chat.model.fused import kernels, plain
from tests.helpers.tiny import (
    WINDOW,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    random_tree,
    reply,
)

assert os.environ.get("TRITON_INTERPRET") == "1"
# A part without keys has a sum of 0.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

# The interpreter multiplies no bfloat16 matrices: those are for tests/test_gpu.py.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def random_mask(seed: int, nodes: int, length: int, span: int, window: int | None) -> TreeMask:
    """Return the mask of a random tree after `length` positions."""
    tree = random_tree(seed, nodes - 1, 6, 4)
    tensors = TreeTensors.of(tree, torch.device("cpu"))
    return TreeMask.of(
        tensors.ancestors,
        tensors.depths + length,
        torch.tensor(length),
        span,
        torch.float32,
        window=window,
    )


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 5]),
    size=st.sampled_from([8, 64, 80, 128]),
    nodes=st.integers(1, 12),
    length=st.integers(0, 110),
    window=st.one_of(st.none(), st.integers(1, 200)),
    softcap=st.sampled_from([None, None, 1.5, 50.0]),
    number=st.sampled_from(list(TOLERANCE)),
    programs=st.sampled_from([1, 7, 24]),
    seed=st.integers(0, 99),
)
@example(1, 1, 16, 90, 0, None, None, torch.float32, 1, 0)  # more rows than a tile, no text
@example(2, 2, 128, 24, 90, 3, None, torch.float32, 16, 1)  # windows shorter than the tree is deep
@example(2, 1, 64, 1, 127, None, None, torch.float16, 64, 2)  # a vanilla step, to the span's end
@example(1, 2, 64, 9, 64, 64, None, torch.float32, 4, 3)  # text that ends where a block does
def test_the_kernel_equals_the_reference(
    kv_heads: int,
    groups: int,
    size: int,
    nodes: int,
    length: int,
    window: int | None,
    softcap: float | None,
    number: torch.dtype,
    programs: int,
    seed: int,
) -> None:
    """Keys and values are slices of a longer cache, which holds NaN after the step's rows."""
    span = 128
    mask = random_mask(seed, nodes, length, span, window)
    rows = len(mask.ancestors)
    generator = torch.Generator().manual_seed(seed)
    query = (
        torch.randn(1, rows, kv_heads * groups, size, generator=generator)
        .to(number)
        .transpose(1, 2)
    )
    cache = torch.randn(2, 1, kv_heads, span + 8, size, generator=generator).to(number)
    key, value = cache[:, :, :, :span]
    expected = torch_attention(query.float(), key.float(), value.float(), mask, size**-0.5, softcap)
    cache[:, :, :, length + rows :] = torch.nan
    ours = attend(query, key, value, mask, size**-0.5, softcap, programs=programs)
    assert ours.dtype == number
    torch.testing.assert_close(
        ours.float(), expected, rtol=TOLERANCE[number], atol=TOLERANCE[number]
    )


@pytest.mark.parametrize("number", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("size", "turned"), [(8, 8), (24, 16), (128, 128)])
def test_the_operations_of_a_layer_are_their_twins(
    number: torch.dtype, size: int, turned: int
) -> None:
    """Rows are views of wider ones, as q, k, v and gate, up of one product are."""
    generator = torch.Generator().manual_seed(size)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(number)

    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert ours.shape == theirs.shape
        tolerance = TOLERANCE[number]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    rows, weight = numbers(1, 3, 9 * size), numbers(9 * size)
    heads = numbers(1, 3, 7 * size)[..., size : 5 * size].view(1, 3, 4, size)
    for kind in ("llama", "gemma"):
        same(kernels.norm(rows, weight, 1e-5, kind), plain.norm(rows, weight, 1e-5, kind))
        small = weight[:size]
        same(kernels.norm(heads, small, 1e-5, kind), plain.norm(heads, small, 1e-5, kind))
    gates, others = numbers(1, 3, 140 * size).chunk(2, -1)
    for active in ("silu", "gelu_tanh"):
        same(kernels.gate(gates, others, active), plain.gate(gates, others, active))
    product = numbers(1, 3, 8 * size).view(1, 3, 8, size).transpose(1, 2)
    query, key, value = product.split([4, 2, 2], 1)
    turn = numbers(1, 3, turned), numbers(1, 3, turned)
    places = torch.tensor([5, 6, 2])
    caches = [torch.zeros(2, 1, 2, 9, size, dtype=number) for _ in range(2)]
    turned_queries = [
        way.rotate(query, (key, value), turn, (*cache, places))
        for way, cache in zip((kernels, plain), caches, strict=True)
    ]
    same(*turned_queries)
    same(*caches)


def test_the_text_has_the_length_on_the_device() -> None:
    """One mask is used at many lengths, as a CUDA graph uses it."""
    mask = random_mask(0, 12, 0, 128, 100)
    depths = mask.positions.clone()
    query, key, value = (torch.randn(1, 4, rows, 32) for rows in (len(depths), 128, 128))
    for length in (0, 5, 128 - len(depths)):
        mask.start.fill_(length)
        mask.positions.copy_(depths + length)
        expected = torch_attention(query, key, value, random_mask(0, 12, length, 128, 100), 0.2)
        torch.testing.assert_close(
            attend(query, key, value, mask, 0.2), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_text_is_that_of_the_eager_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' layers give groups, windows in some layers, softcaps, and a text that outgrows
    its span.
    """
    monkeypatch.setattr(static_step, "SHORTEST_SPAN", 16)
    used = []

    def counted(*arguments: Any) -> Any:
        used.append(arguments[3].window)
        return attend(*arguments)

    backbone = random_backbone(kind)
    backbone.attention = Choice("counted", counted)
    heads, tree = random_heads(backbone), random_tree(3, 12, 4, 4, spine=4)
    eager, fixed = (make_engine(backbone, heads, tree=tree, eager=eager) for eager in (True, False))
    assert reply(eager, prompt_ids(20), max_new_tokens=10) == reply(
        fixed, prompt_ids(20), max_new_tokens=10
    )
    assert set(used) == ({WINDOW} if kind == "mistral" else {None, WINDOW})
