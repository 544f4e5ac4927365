"""Experts' matrices in whole numbers of 8 or 4 bits, in standard ONNX.

before:
    y = MatMul(rows, W)                                           W (in, out)
after:
    y = MatMul(rows, DequantizeLinear(codes, scale[, zero point], axis=0, block_size=32))

DequantizeLinear takes blocks from opset 21 on. Stored like this, (in, out) with blocks along the inputs and a
node a product, onnxruntime runs both nodes as one MatMulNBits that reads the whole numbers (8-bit ones from
version 1.25 on; before, it dequantises at every call). It rounds the rows' numbers to 8 bits too, 32 at a
time; a session with `session.qdq_matmulnbits_accuracy_level` "1" does not, and is several times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dsmoe_compiler.export.onnx.build import Builder
from dsmoe_compiler.export.onnx.lower import Matrix
from dsmoe_compiler.export.onnx.quantize import (
    Blockwise,
    Deviation,
    Quantized,
    deviation,
    quantize,
    scales_of,
)
from dsmoe_compiler.export.onnx.stacks import Stack
from dsmoe_compiler.ir.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Literal["int8", "int4"]

OPSET = 21  # the first with blocks
_STORED = {
    (8, True): (ir.DataType.INT8, np.dtype(np.int8)),
    (8, False): (ir.DataType.UINT8, np.dtype(np.uint8)),
    (4, True): (ir.DataType.INT4, np.dtype(ml_dtypes.int4)),
    (4, False): (ir.DataType.UINT4, np.dtype(ml_dtypes.uint4)),
}
_QUANTISED = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class LayerError:
    """What quantising did to the matrices of one product of a layer, all its experts' together.

    `relative_l2` is ‖ŵ − w‖ / ‖w‖, `largest` max |ŵ − w|.
    """

    name: str
    bits: int
    relative_l2: float
    largest: float


class Errors:
    """The errors of the matrices that were written so far, by the product that reads them."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._found = dict[str, dict[str, Deviation]]()

    def add(self, product: str, matrix: str, found: Deviation) -> None:
        """Keep a matrix's error; written twice, it counts once."""
        self._found.setdefault(product, {})[matrix] = found

    def layers(self) -> tuple[LayerError, ...]:
        """In the order of writing."""
        return tuple(
            LayerError(product, self._bits, together.relative_l2, together.largest)
            for product, parts in self._found.items()
            for together in (sum(parts.values(), Deviation()),)
        )


def quantized(weights: Weights, symmetric: bool | None = None) -> tuple[Matrix, Errors]:
    """How `lower` keeps matrices as `weights`, and where their errors are found once the model is written.

    `symmetric`: codes around 0 without zero points; None takes what is better for that width.
    """
    form = form_of(weights, symmetric)
    errors, reader = Errors(form.bits), _Reader(form)
    read_transposed = dict[str, bool]()
    dtype, stored = _STORED[form.bits, form.symmetric]

    def matrix(to: Builder, stack: Stack, expert: int, transposed: bool) -> ir.Value:
        name, product = stack.names[expert], to.prefix.lstrip("/")
        if stack.dtype not in _QUANTISED:
            raise InputError(
                f"{name}: {stack.dtype.name} weights cannot be quantised; export without weights="
            )
        if read_transposed.setdefault(name, transposed) != transposed:
            raise InputError(
                f"{name}: read both as it is and transposed, so it has no one way of blocks; export without "
                "weights="
            )
        inputs, outputs = stack.shape[::-1] if transposed else stack.shape

        def read() -> Array:
            return stack.read(expert).T if transposed else stack.read(expert)

        def codes() -> Array:
            array = read()
            made = reader.quantized(name, array)
            errors.add(product, name, deviation(array, made))
            return made.codes.astype(stored)

        def zeros() -> Array:
            found = reader.scales(name, read)[1]
            assert found is not None
            return found.astype(stored)

        few = (form.blocks(inputs), outputs)
        parts = [
            to.weight(f"{name}.quantized", (inputs, outputs), dtype, codes),
            to.weight(f"{name}.scale", few, stack.dtype, lambda: reader.scales(name, read)[0]),
        ]
        if not form.symmetric:
            parts.append(to.weight(f"{name}.zero_point", few, dtype, zeros))
        return to.op("DequantizeLinear", *parts, axis=0, block_size=form.block)

    return matrix, errors


def form_of(weights: Weights, symmetric: bool | None = None) -> Blockwise:
    """The blocks of `weights`; `symmetric` None takes the default of that width."""
    bits = {"int8": 8, "int4": 4}[weights]
    return Blockwise(bits, symmetric=bits == 8 if symmetric is None else symmetric)


class _Reader:
    """Quantises matrices as they are written, one at a time, and keeps the last one's scales: they are
    written after its codes.
    """

    def __init__(self, form: Blockwise) -> None:
        self._form = form
        self._last: tuple[str, Array, Array | None] | None = None

    def quantized(self, name: str, matrix: Array) -> Quantized:
        with _naming(name):
            made = quantize(matrix, self._form)
        self._last = (name, made.scales, made.zeros)
        return made

    def scales(self, name: str, read: Callable[[], Array]) -> tuple[Array, Array | None]:
        if self._last is not None and self._last[0] == name:
            return self._last[1:]
        with _naming(name):
            return scales_of(read(), self._form)


@contextmanager
def _naming(matrix: str) -> Iterator[None]:
    """A matrix that cannot be quantised is the user's, by its name."""
    try:
        yield
    except ValueError as e:
        raise InputError(f"{matrix}: {e}") from e
