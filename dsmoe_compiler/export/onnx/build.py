"""Nodes and initializers put into a model in the place of one node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]
Attribute = int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | ir.TensorProtocol


class Builder:
    """What replaces one node: nodes in their order, and the initializers they read. Values and nodes are
    named `prefix` and what they are.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []
        self._seen = Counter[str]()

    def within(self, part: str) -> Builder:
        """A builder of the same nodes, for some that are of one part."""
        builder = Builder(self.graph, f"{self.prefix}/{part}")
        builder.nodes = self.nodes
        return builder

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """The value of a node with one output."""
        (value,) = self.ops(op_type, *inputs, domain=domain, outputs=1, **attributes)
        return value

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        """The values of a node."""
        self._seen[op_type] += 1
        again = f"_{self._seen[op_type] - 1}" if self._seen[op_type] > 1 else ""
        name = f"{self.prefix}/{op_type}{again}"
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}.{i}"
        self.nodes.append(node)
        return node.outputs

    def constant(self, value: Array | Sequence[int] | int) -> ir.Value:
        """An initializer of few numbers (int64, or the array's own type); equal ones are one."""
        array = np.asarray(value, None if isinstance(value, np.ndarray) else np.int64)
        listed = "_".join(map(str, array.reshape(-1).tolist()))
        shape = "x".join(map(str, array.shape))
        name = f"dsmoe.{array.dtype}[{shape}].{listed}"
        known = self.graph.initializers.get(name)
        return known if known is not None else self._register(ir.tensor(array, name=name))

    def weight(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, read: Callable[[], Array]
    ) -> ir.Value:
        """An initializer that is read, as contiguous memory, only when it is written."""
        known = self.graph.initializers.get(name)
        if known is not None:
            return known

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(read()), dtype=dtype, name=name)

        return self._register(ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name))

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, *values: ir.Value) -> None:
        """Put the nodes in the place of `node`, the values in the places of its outputs."""
        self.graph.insert_before(node, self.nodes)
        for old, new in zip(node.outputs, values, strict=True):
            if new.shape is None:
                new.shape, new.type = old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
