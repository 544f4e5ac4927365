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
from dsmoe_compiler.export.onnx.stacks import stack_of


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


class Rows:
    """The parts' rows in turn: (E, parts · count, …), kept in memory by nobody."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.experts, count, *rest = parts[0].shape
        self.shape = (count * len(parts), *rest)
        self._stacks = [stack for part in parts if (stack := stack_of(part.value)) is not None]

    @property
    def is_stored(self) -> bool:
        """Whether they are weights of the model, not computed by it."""
        return len(self._stacks) == len(self.parts)

    def read(self, expert: int) -> Array:
        """One expert's."""
        rows = np.empty(self.shape, np.float32)
        for i, (stack, part) in enumerate(zip(self._stacks, self.parts, strict=True)):
            rows[i :: len(self.parts)] = part.of(stack.read(expert))
        return rows

    def value(self, to: Builder, name: str) -> ir.Value:
        """An initializer called `name`, read when it is written; or nodes, where they are computed."""
        if not self.is_stored:
            return self._computed(to)
        return to.weight(name, (self.experts, *self.shape), ir.DataType.FLOAT, lambda: self.whole(self.read))

    def whole(self, read: Callable[[int], Array]) -> Array:
        """What `read` gives of every expert, E first, with one expert's in memory beside it."""
        first = read(0)
        together = np.empty((self.experts, *first.shape), first.dtype)
        together[0] = first
        for e in range(1, self.experts):
            together[e] = read(e)
        return together

    def _computed(self, to: Builder) -> ir.Value:
        rows = []
        for part in self.parts:
            value = to.op("Transpose", part.value, perm=[0, 2, 1]) if part.transposed else part.value
            last = part.first + part.step * (part.count - 1) + 1
            bounds = (to.constant([at]) for at in (part.first, last, 1, part.step))
            rows.append(to.op("Slice", value, *bounds))
        if len(rows) == 1:
            return rows[0]
        turns = [to.op("Unsqueeze", value, to.constant([2])) for value in rows]
        return to.op("Reshape", to.op("Concat", *turns, axis=2), to.constant([self.experts, *self.shape]))
