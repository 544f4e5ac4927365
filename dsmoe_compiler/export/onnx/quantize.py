"""Weights as whole numbers of 8 or 4 bits, a scale a block of 32 inputs: the numbers, without a model.

    w[i, o]  ≈  (code[i, o] − zero[i // 32, o]) · scale[i // 32, o]

An example, 4 bits, one output, a block of 4 inputs:

    w = 0.7, −0.8, 0.2, 0.0     symmetric:   scale 0.1, codes 7, −8, 2, 0                (no zero points)
                                asymmetric:  scale 0.1, codes 15, 0, 10, 8, zero point 8

Storage, of a matrix (in, out) cut into B = ⌈in / block⌉ blocks along its inputs:

    codes   (in, out)   int8 where symmetric, uint8 where not: one number a byte, 4-bit ones too, −8…7 or 0…15
    scales  (B, out)    the weights' dtype, > 0
    zeros   (B, out)    uint8, asymmetric only, in the codes' own range

The last block may be shorter than the others. `code − zero` is what other layouts of the same numbers keep:
unsigned symmetric codes are these + 2^(bits − 1), with that as their zero point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# The dtypes that weights may have, and their largest numbers.
_LARGEST = {
    np.dtype(np.float32): float(np.finfo(np.float32).max),
    np.dtype(np.float16): float(np.finfo(np.float16).max),
    np.dtype(ml_dtypes.bfloat16): float.fromhex("0x1.fep127"),
}
_SMALLEST = np.finfo(np.float32).tiny  # the scales below it are too coarse: 1.4 of the smallest step is 1


@dataclass(frozen=True)
class Blockwise:
    """How weights are quantised: `bits` 8 or 4, a scale for every `block` inputs of an output, and a zero
    point beside it unless `symmetric`.
    """

    bits: int
    block: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block < 1:
            raise ValueError(f"weights have 4 or 8 bits and blocks of one input or more, got {self}")

    @property
    def lowest(self) -> int:
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    def blocks(self, inputs: int) -> int:
        """How many blocks so many inputs make."""
        return math.ceil(inputs / self.block)


@dataclass(frozen=True)
class Quantized:
    """A matrix's numbers, laid out as this file's head says."""

    form: Blockwise
    codes: Array
    scales: Array
    zeros: Array | None


@dataclass(frozen=True)
class Deviation:
    """How far quantised weights are from what they stand for: Σ (ŵ − w)², Σ w² and max |ŵ − w|.

    Deviations add up: the sum is that of the matrices together.
    """

    squared: float = 0.0
    of: float = 0.0
    largest: float = 0.0

    @property
    def relative_l2(self) -> float:
        """‖ŵ − w‖ / ‖w‖, 0 for weights that are all zero and kept so."""
        return math.sqrt(self.squared / self.of) if self.of else math.sqrt(self.squared)

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(self.squared + other.squared, self.of + other.of, max(self.largest, other.largest))


def quantize(matrix: Array, form: Blockwise) -> Quantized:
    """The matrix (in, out), float32, float16 or bfloat16, in whole numbers: every weight within half a scale,
    and what a dtype of fewer bits then rounds.

    Raises ValueError for another dtype, and for weights that are infinite, no numbers, or as large as those.
    """
    scales, zeros = scales_of(matrix, form)
    blocks = _in_blocks(matrix, form)
    codes = blocks / scales.astype(np.float32)[:, None]
    np.rint(codes, out=codes)
    if zeros is not None:
        codes += zeros[:, None]
    np.clip(codes, form.lowest, form.highest, out=codes)
    whole = codes.astype(np.int8 if form.symmetric else np.uint8)
    return Quantized(form, whole.reshape(-1, matrix.shape[1])[: matrix.shape[0]], scales, zeros)


def scales_of(matrix: Array, form: Blockwise) -> tuple[Array, Array | None]:
    """The scales and the zero points alone, both (B, out): what `quantize` finds, for less.

    Zero is always among the numbers of a block, so that padding and pruned weights stay what they are, and
    no weight is outside of them.
    """
    if matrix.dtype not in _LARGEST:
        raise ValueError(f"weights to quantise are float32, float16 or bfloat16, not {matrix.dtype}")
    blocks = _in_blocks(matrix, form)
    high, low = blocks.max(1, initial=0.0), blocks.min(1, initial=0.0)
    # Half a scale above the largest weight there must be numbers still. Neither inf nor NaN passes.
    if not np.all(np.maximum(high, -low) <= _LARGEST[matrix.dtype] / 2):
        raise ValueError(
            f"weights to quantise are finite and at most half of {matrix.dtype}'s largest; some are not"
        )
    if form.symmetric:
        exact = np.maximum(high / form.highest, low / form.lowest)
    else:
        exact = high / form.highest - low / form.highest  # their difference may be more than a float32
    # Asked of the weights: the smallest numbers there are, divided, are 0 too.
    exact = np.where((high == 0) & (low == 0), np.float32(1), np.maximum(exact, _SMALLEST))
    scales = _rounded_up(exact, matrix.dtype)
    return scales, None if form.symmetric else np.rint(-low / scales.astype(np.float32)).astype(np.uint8)


def dequantize(quantized: Quantized) -> Array:
    """The weights that the numbers stand for, (in, out) in the scales' dtype, as DequantizeLinear does it."""
    form, shape = quantized.form, quantized.codes.shape
    blocks = _in_blocks(quantized.codes, form)
    if quantized.zeros is not None:
        blocks = blocks - quantized.zeros.astype(np.float32)[:, None]
    blocks = blocks * quantized.scales.astype(np.float32)[:, None]
    return blocks.reshape(-1, shape[1])[: shape[0]].astype(quantized.scales.dtype)


def deviation(matrix: Array, quantized: Quantized) -> Deviation:
    """How far the numbers are from the matrix they were made of."""
    exact = matrix.astype(np.float32)
    apart = dequantize(quantized).astype(np.float32) - exact
    largest = float(np.abs(apart).max(initial=0.0))
    return Deviation(_squared(apart), _squared(exact), largest)


def _in_blocks(matrix: Array, form: Blockwise) -> Array:
    """Float32 numbers (B, block, out), zeros where a matrix (in, out) ends within a block."""
    inputs, outputs = matrix.shape
    blocks = form.blocks(inputs)
    padded: Array = np.zeros((blocks * form.block, outputs), np.float32)
    padded[:inputs] = matrix
    return padded.reshape(blocks, form.block, outputs)


def _rounded_up(scales: Array, dtype: np.dtype[Any]) -> Array:
    """Scales in a dtype, none less than it was: the largest weight of a block has a code."""
    nearest = scales.astype(dtype)
    above = np.nextafter(nearest, np.array(np.inf, dtype))
    return np.where(nearest.astype(np.float32) < scales, above, nearest)


def _squared(numbers: Array) -> float:
    flat = numbers.reshape(-1).astype(np.float64)
    return float(np.dot(flat, flat))
