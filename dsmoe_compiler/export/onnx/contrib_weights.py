"""A layer's matrices and biases as onnxruntime's kernels read them: one tensor a product, gate and up
interleaved.

before: gate, up (E, F, D), or rows of one (E, 2·F, D), or any of them transposed, or a tensor an expert
after:  (E, 2·F, D), rows gate 0, up 0, gate 1, up 1, …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dsmoe_compiler.export.onnx.build import Array, Builder
from dsmoe_compiler.export.onnx.stacks import Stack, stack_of


@dataclass(frozen=True)
class Part:
    """Rows `first`, `first + step`, … of what every expert has, `count` of them, in a value (E, …): rows of
    a matrix (out, in), or columns of one (in, out) where `transposed`, or numbers of a vector.
    """

    value: ir.Value
    first: int
    step: int
    count: int
    transposed: bool = False

    def of(self, tensor: Array) -> Array:
        """The rows, of one expert's tensor."""
        rows = tensor.T if self.transposed else tensor
        return rows[self.first :: self.step][: self.count]

    @property
    def shape(self) -> list[int]:
        """Of the rows of all experts, E first."""
        assert self.value.shape is not None
        experts, *shape = self.value.shape.numpy()
        return [experts, self.count, *shape[:-1]] if self.transposed else [experts, self.count, *shape[1:]]


def interleaved(to: Builder, name: str, parts: Sequence[Part]) -> ir.Value:
    """The parts' rows in turn, (E, parts · count, …): an initializer called `name`, read an expert at a time
    when it is written, or nodes where a part is computed.
    """
    experts, count, *rest = parts[0].shape
    shape = [experts, count * len(parts), *rest]
    stacks = [stack for part in parts if (stack := stack_of(part.value)) is not None]
    if len(stacks) < len(parts):
        return _computed(to, parts, shape)
    return to.weight(name, shape, stacks[0].dtype, _reader(shape, stacks, parts))


def _reader(shape: Sequence[int], stacks: Sequence[Stack], parts: Sequence[Part]) -> Callable[[], Array]:
    def read() -> Array:
        whole = np.empty(shape, stacks[0].dtype.numpy())
        for e in range(shape[0]):
            for i, (stack, part) in enumerate(zip(stacks, parts, strict=True)):
                whole[e, i :: len(parts)] = part.of(stack.read(e))
        return whole

    return read


def _computed(to: Builder, parts: Sequence[Part], shape: Sequence[int]) -> ir.Value:
    rows = []
    for part in parts:
        value = to.op("Transpose", part.value, perm=[0, 2, 1]) if part.transposed else part.value
        last = part.first + part.step * (part.count - 1) + 1
        bounds = (to.constant([at]) for at in (part.first, last, 1, part.step))
        rows.append(to.op("Slice", value, *bounds))
    if len(rows) == 1:
        return rows[0]
    turns = [to.op("Unsqueeze", value, to.constant([2])) for value in rows]
    return to.op("Reshape", to.op("Concat", *turns, axis=2), to.constant(list(shape)))
