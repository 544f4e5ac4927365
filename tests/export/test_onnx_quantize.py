"""Weights in whole numbers: what they stand for is as near as a scale says, and what cannot be is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

ml_dtypes = pytest.importorskip("ml_dtypes")
pytest.importorskip("onnx")

from dsmoe_compiler.export.onnx.quantize import (  # noqa: E402
    Blockwise,
    Deviation,
    Quantized,
    dequantize,
    deviation,
    quantize,
    scales_of,
)

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# A dtype's numbers of its own size: how far apart they are, relatively, and the smallest above 0.
ULP = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
LARGEST = {"float32": 2.0**127 * (1 - 2.0**-24), "float16": 32752.0, "bfloat16": 2.0**127 * (1 - 2.0**-8)}


@st.composite
def forms(draw: st.DrawFn) -> Blockwise:
    return Blockwise(
        draw(st.sampled_from((4, 8))), draw(st.sampled_from((1, 3, 16, 32))), draw(st.booleans())
    )


@st.composite
def matrices(draw: st.DrawFn) -> Array:
    """Any weights that may be quantised: of all sizes, denormal ones too, and pruned ones."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = (draw(st.integers(1, 70)), draw(st.integers(1, 5)))
    # Up to the largest there are, and so small that their scales are denormal, or would be 0.
    limit = draw(
        st.sampled_from((LARGEST[dtype.name], 300.0, 1.0, 2.0**-14, 2.0**-17, 2.0**-130, 190 * 2.0**-149))
    )
    numbers = st.floats(-1.0, 1.0, width=32)
    drawn = draw(arrays.arrays(np.float32, shape, elements=numbers, fill=st.sampled_from((0.0, 0.5))))
    made: Array = (drawn.astype(np.float64) * limit).astype(dtype)
    return made


def scale_of_each(quantized: Quantized) -> Array:
    """Every weight's scale, (in, out)."""
    wide = quantized.scales.astype(np.float64)
    return np.repeat(wide, quantized.form.block, axis=0)[: quantized.codes.shape[0]]


@given(matrices(), forms())
def test_every_weight_is_within_half_a_scale(matrix: Array, form: Blockwise) -> None:
    made = quantize(matrix, form)
    back, exact = dequantize(made).astype(np.float64), matrix.astype(np.float64)
    rounding = np.abs(back) * ULP[matrix.dtype.name] + SMALLEST[matrix.dtype.name]
    # Dividing and multiplying in float32 moves a code of 255 by 255 · 2^-24 of a scale.
    half = scale_of_each(made) * (0.5 + 2.0**-15)
    assert (np.abs(back - exact) <= half + rounding).all()


@given(matrices(), forms())
@example(np.full((32, 1), 1.33e-43, np.float32), Blockwise(8, symmetric=False))
def test_no_scale_is_larger_than_its_block_needs(matrix: Array, form: Blockwise) -> None:
    """A bound by the scale says nothing of a scale that is too large."""
    scales = quantize(matrix, form).scales.astype(np.float64)
    steps = form.highest if form.symmetric else form.highest - form.lowest
    for block in range(form.blocks(matrix.shape[0])):
        rows = matrix[block * form.block : (block + 1) * form.block].astype(np.float64)
        high, low = np.maximum(rows.max(0), 0), np.minimum(rows.min(0), 0)
        needed = np.maximum(high, -low) if form.symmetric else high - low
        least = max(SMALLEST[matrix.dtype.name], 2.0**-126)
        allowed = np.maximum(needed / steps, least) * (1 + 2 * ULP[matrix.dtype.name])
        assert (scales[block] <= np.where(needed == 0, 1.0, allowed + SMALLEST[matrix.dtype.name])).all()


@given(matrices(), forms())
def test_codes_scales_and_zero_points_are_stored_as_described(matrix: Array, form: Blockwise) -> None:
    inputs, outputs = matrix.shape
    made = quantize(matrix, form)
    blocks = math.ceil(inputs / form.block)
    assert made.codes.shape == (inputs, outputs) and made.scales.shape == (blocks, outputs)
    assert made.scales.dtype == matrix.dtype
    assert (made.scales > 0).all() and np.isfinite(made.scales.astype(np.float64)).all()
    assert form.lowest <= made.codes.min() and made.codes.max() <= form.highest
    if form.symmetric:
        assert made.codes.dtype == np.int8 and made.zeros is None
    else:
        assert made.codes.dtype == np.uint8
        assert made.zeros is not None and made.zeros.dtype == np.uint8
        assert made.zeros.shape == (blocks, outputs) and made.zeros.max() <= form.highest


@given(matrices(), forms())
def test_pruned_weights_stay_zero(matrix: Array, form: Blockwise) -> None:
    assert (dequantize(quantize(matrix, form))[matrix == 0] == 0).all()


@given(matrices(), forms())
def test_scales_alone_are_those_of_the_numbers(matrix: Array, form: Blockwise) -> None:
    made, (scales, zeros) = quantize(matrix, form), scales_of(matrix, form)
    np.testing.assert_array_equal(scales, made.scales)
    if made.zeros is None:
        assert zeros is None
    else:
        np.testing.assert_array_equal(zeros, made.zeros)


@given(matrices(), forms())
def test_transposed_memory_gives_the_same_numbers(matrix: Array, form: Blockwise) -> None:
    strided = np.asfortranarray(matrix)
    np.testing.assert_array_equal(quantize(matrix, form).codes, quantize(strided, form).codes)


@given(matrices(), forms())
def test_deviation_is_the_distance_to_the_weights(matrix: Array, form: Blockwise) -> None:
    made = quantize(matrix, form)
    found = deviation(matrix, made)
    exact = matrix.astype(np.float64)
    apart = dequantize(made).astype(np.float64) - exact
    numbers = (found.largest, math.sqrt(found.squared), math.sqrt(found.of))
    expected = (np.abs(apart).max(), np.sqrt((apart**2).sum()), np.sqrt((exact**2).sum()))
    # Differences are taken in float32.
    np.testing.assert_allclose(numbers, expected, rtol=1e-5, atol=2.0**-149)


@pytest.mark.parametrize(
    ("symmetric", "codes", "zeros"),
    [(True, [7, -8, 2, 0], None), (False, [15, 0, 10, 8], [[8]])],
    ids=["symmetric", "asymmetric"],
)
def test_the_example_of_the_description(
    symmetric: bool, codes: list[int], zeros: list[list[int]] | None
) -> None:
    made = quantize(np.array([[0.7], [-0.8], [0.2], [0.0]], np.float32), Blockwise(4, 4, symmetric))
    assert made.codes[:, 0].tolist() == codes
    assert (
        (made.zeros is None) if zeros is None else (made.zeros is not None and made.zeros.tolist() == zeros)
    )
    np.testing.assert_allclose(made.scales, [[0.1]], rtol=1e-6)
    np.testing.assert_allclose(dequantize(made)[:, 0], [0.7, -0.8, 0.2, 0.0], rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.1])
def test_a_constant_block_is_kept(value: float, bits: int, symmetric: bool) -> None:
    matrix = np.full((40, 2), value, np.float32)
    back = dequantize(quantize(matrix, Blockwise(bits, 32, symmetric)))
    np.testing.assert_allclose(back, matrix, rtol=3e-7, atol=0)


def test_deviations_add_up() -> None:
    both = sum((Deviation(9.0, 64.0, 0.5), Deviation(16.0, 36.0, 0.25)), Deviation())
    assert both == Deviation(25.0, 100.0, 0.5) and both.relative_l2 == 0.5
    assert Deviation().relative_l2 == 0


def test_zero_points_halve_the_error_of_lopsided_weights() -> None:
    matrix = np.random.default_rng(0).uniform(0, 1, (64, 8)).astype(np.float32)
    apart = [deviation(matrix, quantize(matrix, Blockwise(4, 32, s))).relative_l2 for s in (True, False)]
    assert apart[1] < 0.6 * apart[0]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_weights_that_are_no_numbers_are_refused(bad: float, dtype: np.dtype[Any]) -> None:
    matrix = np.ones((40, 3), dtype)
    matrix[37, 1] = bad
    for form in (Blockwise(4), Blockwise(8, symmetric=False)):
        with pytest.raises(ValueError, match="finite"):
            quantize(matrix, form)


def test_weights_near_the_end_of_their_dtype_are_refused() -> None:
    """Half a scale above them would be infinite."""
    with pytest.raises(ValueError, match="half of float16's largest"):
        quantize(np.full((4, 1), 60000, np.float16), Blockwise(4))


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_other_dtypes_are_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        quantize(np.ones((4, 1), dtype), Blockwise(8))


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (16, 32), (8, 0)])
def test_other_widths_and_empty_blocks_are_refused(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match="4 or 8 bits"):
        Blockwise(bits, block)
