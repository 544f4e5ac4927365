"""The operators that a layer is carried by, as standard ones: sorting, and a product an expert.

before:
    tokens, slots, experts, inverse, counts = dsmoe::Sort(ids)
    y = dsmoe::GroupedMatMul(rows, counts, W)
    rows = dsmoe::Rows(values, places)
    out = dsmoe::WeightedSum(y, weights)
after:
    sorted, slots = TopK(ids, P, smallest first);  tokens = slots / K;  counts = how many ids are 0, 1, …
    part_0, part_1, … = Split(rows, counts)
    y = Concat(part_0 · W_0, part_1 · W_1, …)
    rows = Gather(values, places)
    out = weights (T, 1, K) · y (T, K, n)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from dsmoe_compiler.export.onnx.build import Builder
from dsmoe_compiler.export.onnx.carry import OUTPUT, PACK
from dsmoe_compiler.export.onnx.initializers import TRANSPOSED
from dsmoe_compiler.export.onnx.split_form import GROUPED_MATMUL, ROWS, SORT, WEIGHTED_SUM
from dsmoe_compiler.export.onnx.stacks import Stack, stack_of

_DOMAIN = SORT.split("::")[0]
# A product's matrix (in, out) of one expert, as a value: an initializer, or what is made of some.
Matrix = Callable[[Builder, Stack, int, bool], ir.Value]


def lower(model: ir.Model, names: Mapping[int, str], matrix: Matrix) -> dict[int, ir.Value]:
    """Replace every operator of our own; what each layer gives, by its number. `names` are the layers', for
    the nodes' names; `matrix` says how weights are kept.
    """
    layer, outputs = "", dict[int, ir.Value]()
    for node in list(model.graph):
        if node.domain != _DOMAIN:
            continue
        if node.op_type == SORT.split("::")[1]:
            layer = names[node.attributes.get_int("layer")]
            _sort(model.graph, node, layer)
        elif node.op_type == GROUPED_MATMUL.split("::")[1]:
            _grouped(model.graph, node, layer, matrix)
        elif node.op_type == ROWS.split("::")[1]:
            to = Builder(model.graph, f"{layer}/rows")
            to.replace(node, to.op("Gather", *node.inputs, axis=0))
        elif node.op_type == WEIGHTED_SUM.split("::")[1]:
            _weighted_sum(model.graph, node, layer)
        elif node.op_type == OUTPUT.split("::")[1]:
            outputs[node.attributes.get_int("layer")] = _output(model.graph, node)
    for node in reversed(list(model.graph)):  # what is left of the stacks
        if node.domain == _DOMAIN and node.op_type == PACK.split("::")[1]:
            _pack(model.graph, node)
    model.opset_imports.pop(_DOMAIN, None)
    return outputs


def _sort(graph: ir.Graph, node: ir.Node, layer: str) -> None:
    ids_P = node.inputs[0]
    experts, slots = node.attributes.get_int("experts"), node.attributes.get_int("slots")
    drops = node.attributes.get_int("drops")
    to = Builder(graph, f"{layer}/sort")
    count = to.op("Shape", ids_P)
    sorted_P, slot_P = to.ops("TopK", ids_P, count, outputs=2, axis=0, largest=0, sorted=1)
    token_P = slot_P if slots == 1 else to.op("Div", slot_P, to.constant(slots))
    # Where each pair went: the permutation that sorts the sorting one.
    _, inverse_P = to.ops("TopK", slot_P, count, outputs=2, axis=0, largest=0, sorted=1)
    groups = to.constant(np.arange(-drops, experts, dtype=np.int64))
    equal = to.op("Equal", to.op("Unsqueeze", ids_P, to.constant([1])), groups)
    counts = to.op("ReduceSum", to.op("Cast", equal, to=ir.DataType.INT64), to.constant([0]), keepdims=0)
    to.replace(node, token_P, slot_P, sorted_P, inverse_P, counts)


def _grouped(graph: ir.Graph, node: ir.Node, layer: str, matrix: Matrix) -> None:
    rows_P, counts, stacked = node.inputs
    assert rows_P is not None and counts is not None and stacked is not None
    transposed, drops = bool(node.attributes.get_int("transposed")), node.attributes.get_int("drops")
    stack = stack_of(stacked)
    assert stacked.shape is not None
    experts, *shape = stacked.shape.numpy()
    inputs, outputs = reversed(shape) if transposed else shape
    to = Builder(graph, f"{layer}/{_short(stacked, stack)}")
    parts = to.ops("Split", rows_P, counts, outputs=experts + drops, axis=0)
    products = []
    for e, part in enumerate(parts[drops:]):
        weight = _computed(to, stacked, e, transposed) if stack is None else matrix(to, stack, e, transposed)
        products.append(to.within(f"expert_{e}").op("MatMul", part, weight))
    if drops:  # rows of zeros for those that no expert sees
        dropped = to.op("Slice", counts, to.constant([0]), to.constant([1]))
        size = to.op("Concat", dropped, to.constant([outputs]), axis=0)
        zero = ir.tensor(np.zeros(1, rows_P.dtype.numpy() if rows_P.dtype else np.float32))
        products.insert(0, to.op("ConstantOfShape", size, value=zero))
    to.replace(node, to.op("Concat", *products, axis=0))


def _weighted_sum(graph: ir.Graph, node: ir.Node, layer: str) -> None:
    y_TKD, weights_TK = node.inputs
    to = Builder(graph, f"{layer}/sum")
    weights_T1K = to.op("Unsqueeze", weights_TK, to.constant([1]))
    to.replace(node, to.op("Squeeze", to.op("MatMul", weights_T1K, y_TKD), to.constant([1])))


def _computed(to: Builder, stacked: ir.Value, expert: int, transposed: bool) -> ir.Value:
    """An expert's matrix of a stack that the model computes."""
    one = to.op("Gather", stacked, to.constant(expert), axis=0)
    return to.op("Transpose", one, perm=[1, 0]) if transposed else one


def _output(graph: ir.Graph, node: ir.Node) -> ir.Value:
    (value,) = node.inputs
    assert value is not None
    Builder(graph, "").replace(node, value)
    return value


def _pack(graph: ir.Graph, node: ir.Node) -> None:
    """The stack itself, where something else than a product reads it."""
    if not any(output.uses() for output in node.outputs):
        graph.remove(node, safe=True)
        return
    to = Builder(graph, node.name or "pack")
    parts = [to.op("Unsqueeze", part, to.constant([0])) for part in node.inputs]
    to.replace(node, to.op("Concat", *parts, axis=0))


def _short(stacked: ir.Value, stack: Stack | None) -> str:
    """What the matrices are called within their layer."""
    parts = (stack.names[0] if stack else str(stacked.name)).split(".")
    return next((p for p in reversed(parts) if not p.isdigit() and p != "weight"), "weight")


def plain(to: Builder, stack: Stack, expert: int, transposed: bool) -> ir.Value:
    """An expert's matrix in the model's own numbers, (in, out)."""
    name = stack.names[expert]
    if not transposed:
        return to.weight(name, stack.shape, stack.dtype, lambda: stack.read(expert))
    return to.weight(f"{name}{TRANSPOSED}", stack.shape[::-1], stack.dtype, lambda: stack.read(expert).T)
