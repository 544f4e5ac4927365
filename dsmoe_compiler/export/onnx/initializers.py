"""A model's weights: as few as there are tensors, stored as they are read."""

from __future__ import annotations

import onnx_ir as ir
import torch

from dsmoe_compiler.export.onnx.build import Builder

# After the name of a matrix that is stored transposed, until it is known that the name itself is free.
TRANSPOSED = ".T"


def store_transposed(graph: ir.Graph) -> None:
    """Store a matrix that is only read transposed as it is read; it keeps its name.

    before: y = MatMul(x, Transpose(W)), W (out, in)      after: y = MatMul(x, W), W (in, out)
    """
    _merge_tied(graph)
    for value in list(graph.initializers.values()):
        readers = {use.node for use in value.uses()}
        read_whole = value.is_graph_output() or len(value.shape or ()) != 2
        if readers and not read_whole and all(map(_transposes, readers)):
            _transposed(graph, value, list(readers))


def drop_unused(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads; a matrix that is only kept transposed has its name then."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    for name, value in list(graph.initializers.items()):
        plain = name.removesuffix(TRANSPOSED)
        if plain not in graph.initializers:
            value.name = plain


def _merge_tied(graph: ir.Graph) -> None:
    """A tensor that the model knows by several names is written once, by the first."""
    first = dict[object, ir.Value]()
    for name, value in list(graph.initializers.items()):
        tensor = getattr(value.const_value, "raw", None)
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        known = first.setdefault(key, value)
        if known is not value and not value.is_graph_output():
            value.replace_all_uses_with(known)
            del graph.initializers[name]


def _transposes(node: ir.Node) -> bool:
    swaps = tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)
    is_transpose = node.op_type == "Transpose" and not node.domain and swaps
    return is_transpose and not node.outputs[0].is_graph_output()


def _transposed(graph: ir.Graph, value: ir.Value, readers: list[ir.Node]) -> None:
    tensor, name = value.const_value, value.name
    assert tensor is not None and name is not None
    rows, columns = tensor.shape.numpy()
    del graph.initializers[name]
    to = Builder(graph, name)
    stored = to.weight(name, (columns, rows), tensor.dtype, lambda: tensor.numpy().T)
    for reader in readers:
        to.replace(reader, stored)
