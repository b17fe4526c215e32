"""The native products: right within float32's rounding, and equal bit for bit row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import native_kernels as native
from tests.helpers.native_kernels import BFLOAT16, FLOAT32, FORMATS, INT8, NF4

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = [(1, 64), (32, 64), (33, 128), (31, 576), (96, 192), (257, 320), (48, 2048)]
ODD_SIZES = [(1, 1), (5, 3), (16, 80), (33, 96), (40, 65), (64, 127), (37, 99)]


pytestmark = pytest.mark.usefixtures("variant")


@pytest.fixture(params=native.variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run on one variant after the other; the best one is left in use."""
    native.use(request.param)
    yield request.param
    native.use(native.variants()[-1])


def numbers(seed: int, *shape: int) -> Any:
    """Draw float32 numbers of mixed magnitude, a few of them large as activations have them."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(shape) * draw.choice([0.1, 1, 1, 8], shape)
    return values.astype(np.float32)


def check_close(kind: int, weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Compare with float64: each of `inputs` additions may round once."""
    exact, size = native.reference(kind, weights, x)
    tolerance = 2.0**-23 * np.sqrt(weights.shape[1]) * size + 1e-6
    assert (np.abs(y - exact) <= tolerance).all(), np.abs((y - exact) / tolerance).max()


def sizes_of(kind: int) -> list[tuple[int, int]]:
    """List the sizes that a format can hold."""
    return SIZES if kind == NF4 else SIZES + ODD_SIZES


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_a_product_is_the_float64_product_of_the_rounded_numbers(kind: int, rows: int) -> None:
    for outputs, inputs in sizes_of(kind):
        weights, x = numbers(1, outputs, inputs), numbers(2, rows, inputs)
        check_close(kind, weights, x, native.multiply(native.pack(kind, weights), x))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_bias_is_added(kind: int) -> None:
    weights, x, bias = numbers(1, 37, 128), numbers(2, 5, 128), numbers(3, 37)
    plain = native.multiply(native.pack(kind, weights), x)
    np.testing.assert_array_equal(
        native.multiply(native.pack(kind, weights, bias), x), plain + bias
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_all_variants_agree(kind: int) -> None:
    for outputs, inputs in sizes_of(kind):
        weights, x = numbers(4, outputs, inputs), numbers(5, 9, inputs)
        packed = native.pack(kind, weights)
        _, size = native.reference(kind, weights, x)
        results = []
        for name in native.variants():
            native.use(name)
            results.append(native.multiply(packed, x))
        for result in results[1:]:
            assert (np.abs(result - results[0]) <= 2.0**-22 * np.sqrt(inputs) * size + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_is_the_same_bit_for_bit_whatever_runs_beside_it(data: st.DataObject) -> None:
    """Any rows, any split of the outputs and of the preparation: equal to the row alone."""
    native.use(data.draw(st.sampled_from(native.variants())))
    kind = data.draw(st.sampled_from(FORMATS))
    outputs = data.draw(st.integers(1, 200))
    inputs = 64 * data.draw(st.integers(1, 6)) if kind == NF4 else data.draw(st.integers(1, 400))
    rows = data.draw(st.integers(1, 70))
    seed = data.draw(st.integers(0, 1000))
    packed = native.pack(kind, numbers(seed, outputs, inputs))
    x = numbers(seed + 1, rows, inputs)
    tiles = (outputs - 1) // native.TILE
    splits = tuple(sorted(data.draw(st.sets(st.integers(1, tiles)) if tiles else st.just(set()))))
    parts = tuple(
        sorted(data.draw(st.sets(st.integers(1, rows - 1)) if rows > 1 else st.just(set())))
    )
    together = native.multiply_prepared(packed, native.prepare(kind, x, parts), rows, splits)
    alone = np.concatenate([native.multiply(packed, x[row : row + 1]) for row in range(rows)])
    np.testing.assert_array_equal(together.view(np.uint32), alone.view(np.uint32))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [9, 17, 33, 70])
def test_many_inputs_in_parts_give_what_a_row_alone_gives(kind: int, rows: int) -> None:
    """More inputs than stay in the first cache while all rows pass over them."""
    for inputs in (1216, 2240) if kind == NF4 else (1216, 2235):
        weights, x = numbers(4, 40, inputs), numbers(5, rows, inputs)
        packed = native.pack(kind, weights)
        together = native.multiply(packed, x)
        alone = np.concatenate([native.multiply(packed, x[row : row + 1]) for row in range(rows)])
        np.testing.assert_array_equal(together.view(np.uint32), alone.view(np.uint32))


@pytest.mark.skipif("amx" not in native.variants(), reason="the processor has no AMX")
@pytest.mark.parametrize("kind", [INT8, NF4])
def test_tiles_of_amx_sum_bytes_as_vectors_do(kind: int) -> None:
    packed, x = native.pack(kind, numbers(4, 40, 1216)), numbers(5, 70, 1216)
    products = []
    for name in ("avx512", "amx"):
        native.use(name)
        products.append(native.multiply(packed, x).view(np.uint32))
    np.testing.assert_array_equal(*products)


@pytest.mark.parametrize("kind", FORMATS)
def test_packing_in_parts_and_from_bfloat16_gives_the_same(kind: int) -> None:
    weights = native.from_bfloat16(native.to_bfloat16(numbers(6, 75, 192)))
    whole = native.pack(kind, weights)
    np.testing.assert_array_equal(native.pack(kind, weights, step=7).memory, whole.memory)
    halves = native.pack(kind, native.to_bfloat16(weights))
    np.testing.assert_array_equal(halves.memory, whole.memory)


def test_codes_of_int8_can_be_packed_as_they_are() -> None:
    draw = np.random.default_rng(7)
    codes = draw.integers(-128, 128, (45, 99), dtype=np.int8)
    scales = draw.random(45, dtype=np.float32)
    packed = native.empty(INT8, 45, 99)
    x = numbers(8, 6, 99)
    pointers = (native.pointer(codes), native.pointer(scales), native.pointer(packed.memory))
    native.library().mc_pack_int8(45, 99, 0, 45, *pointers)
    exact = native.rounded_rows(INT8, x) @ (codes * scales[:, None].astype(np.float64)).T
    np.testing.assert_allclose(native.multiply(packed, x), exact, rtol=1e-5, atol=1e-2)


def test_the_largest_codes_do_not_saturate() -> None:
    """The sum of 127 * 127 * 4 overflows 16 bits, which vpmaddubsw would clip."""
    weights = np.ones((32, 640), dtype=np.float32)
    x = np.ones((4, 640), dtype=np.float32)
    x[1] = -1
    y = native.multiply(native.pack(INT8, weights), x)
    np.testing.assert_allclose(y, np.repeat(x[:, :1] * 640, 32, axis=1), rtol=1e-6)


def test_checkpoints_of_bitsandbytes_are_packed_as_they_are() -> None:
    weights, x = numbers(9, 50, 256), numbers(10, 3, 256)
    codes, absmax = native.nf4_codes(weights)
    joined = (codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8)
    packed = native.empty(NF4, 50, 256)
    pointers = (native.pointer(joined), native.pointer(absmax), native.pointer(packed.memory))
    native.library().mc_pack_nf4(50, 256, 0, 50, *pointers)
    np.testing.assert_array_equal(packed.memory, native.pack(NF4, weights).memory)
    check_close(NF4, weights, x, native.multiply(packed, x))


def test_sizes_that_a_format_cannot_hold_are_refused() -> None:
    packed_bytes = native.library().mc_packed_bytes
    assert packed_bytes(NF4, 32, 80) == 0
    assert packed_bytes(NF4, 4097, 576) > 0
    assert packed_bytes(FLOAT32, 0, 64) == 0
    assert packed_bytes(INT8, 32, 80) > 0


@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_that_are_not_finite_show(kind: int) -> None:
    """A row with NaN or infinity gives no finite result, and leaves the other rows alone."""
    weights, x = np.abs(numbers(11, 40, 128)) + 1, numbers(12, 4, 128)
    packed = native.pack(kind, weights)
    before = native.multiply(packed, x)
    x[1, 70] = np.nan
    x[2, 3] = np.inf
    after = native.multiply(packed, x)
    assert not np.isfinite(after[1:3]).any()
    np.testing.assert_array_equal(after[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_zeros_and_tiny_numbers_give_zeros_or_tiny_numbers(kind: int) -> None:
    x = np.zeros((3, 64), dtype=np.float32)
    x[1] = 1e-35
    x[2] = 1e-25
    y = native.multiply(native.pack(kind, np.ones((8, 64), dtype=np.float32)), x)
    assert (y[0] == 0).all()
    assert (np.abs(y[1]) < 1e-32).all()
    np.testing.assert_allclose(y[2], 64e-25, rtol=0.01)


def test_rows_may_lie_apart() -> None:
    x = numbers(13, 5, 300)
    packed = native.pack(BFLOAT16, numbers(14, 64, 200))
    apart = native.multiply(packed, x[:, :200])
    np.testing.assert_array_equal(apart, native.multiply(packed, x[:, :200].copy()))
