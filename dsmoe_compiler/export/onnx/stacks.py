"""The experts' weights of a model, one expert at a time: views of the model's own memory, read when they
are written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dsmoe_compiler.export.onnx.carry import PACK

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape, an expert each. `read(e)` is expert e's, `names` what each is called."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    read: Callable[[int], Array]


def stack_of(value: ir.Value) -> Stack | None:
    """The experts' tensors behind a value (E, …): an initializer, several packed, or either with its last two
    dimensions exchanged. None where they are computed.
    """
    node = value.producer()
    if node is None:
        return None if value.const_value is None else _of_initializer(value)
    if node.domain == PACK.split("::")[0] and node.op_type == PACK.split("::")[1]:
        return _of_parts([v for v in node.inputs if v is not None])
    if node.op_type == "Transpose" and node.inputs[0] is not None:
        perm = node.attributes.get_ints("perm", ())
        inner = stack_of(node.inputs[0])
        if inner is not None and tuple(perm) == (0, 2, 1):
            rows, columns = inner.shape
            return Stack(inner.names, (columns, rows), inner.dtype, lambda e: inner.read(e).T)
    return None


def _of_initializer(value: ir.Value) -> Stack:
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    count, *shape = tensor.shape.numpy()
    names = tuple(f"{value.name}.{e}" for e in range(count))
    return Stack(names, tuple(shape), tensor.dtype, lambda e: tensor.numpy()[e])


def _of_parts(parts: list[ir.Value]) -> Stack | None:
    tensors = [part.const_value for part in parts]
    if any(t is None for t in tensors):
        return None
    known = [t for t in tensors if t is not None]
    names = tuple(str(part.name) for part in parts)
    return Stack(names, tuple(known[0].shape.numpy()), known[0].dtype, lambda e: known[e].numpy())
