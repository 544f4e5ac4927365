"""A layer's matrices in whole numbers of 8 or 4 bits, as onnxruntime's `com.microsoft::QMoE` reads them.

    codes   (E, out, in)       uint8; of 4 bits (E, out, in / 2), the even input's in the low half of a byte
    scales  (E, out, in / 32)  float32
    zeros   (E, out, in / 32)  as the codes, of 4 bits two a byte; none where codes lie around 2^(bits − 1)

The kernel has widths that are multiples of 32. It rounds a row's numbers to 8 bits as well, 32 at a time:
with 8-bit weights always, with 4-bit ones at the accuracy level 4 (three times the speed of 0).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from dsmoe_compiler.export.onnx.build import Array, Builder
from dsmoe_compiler.export.onnx.contrib_weights import Rows
from dsmoe_compiler.export.onnx.quantize import Blockwise, deviation, quantize, scales_of
from dsmoe_compiler.export.onnx.quantized_matrix import Errors

ACCURACY_LEVEL = 4


def quantized(
    to: Builder, name: str, rows: Rows, form: Blockwise, errors: Errors | None
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes, scales and zero points of stored matrices (E, out, in), found when they are written; `errors`
    is told of each expert's.
    """
    outputs, inputs = rows.shape
    blocks = form.blocks(inputs)

    def codes(expert: int) -> Array:
        matrix = rows.read(expert).T
        made = quantize(matrix, form)
        if errors is not None:
            errors.add(name, f"{name}.{expert}", deviation(matrix, made))
        shift = 1 << form.bits - 1 if form.symmetric else 0
        return packed((made.codes.T.astype(np.int16) + shift).astype(np.uint8), form.bits)

    def scales(expert: int) -> Array:
        return scales_of(rows.read(expert).T, form)[0].T

    def zeros(expert: int) -> Array:
        found = scales_of(rows.read(expert).T, form)[1]
        assert found is not None
        return packed(found.T, form.bits)

    def weight(suffix: str, width: int, dtype: ir.DataType, read: Callable[[int], Array]) -> ir.Value:
        shape = (rows.experts, outputs, width)
        return to.weight(f"{name}.{suffix}", shape, dtype, lambda: rows.whole(read))

    return (
        weight("quantized", _bytes(inputs, form.bits), ir.DataType.UINT8, codes),
        weight("scale", blocks, ir.DataType.FLOAT, scales),
        None if form.symmetric else weight("zero_point", _bytes(blocks, form.bits), ir.DataType.UINT8, zeros),
    )


def packed(numbers: Array, bits: int) -> Array:
    """Unsigned numbers (out, n) of 8 bits as they are, or of 4 bits two a byte, the first one low."""
    if bits == 8:
        return numbers
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    both: Array = numbers[:, 0::2] | numbers[:, 1::2] << 4
    return both


def _bytes(numbers: int, bits: int) -> int:
    return -(-numbers * bits // 8)
