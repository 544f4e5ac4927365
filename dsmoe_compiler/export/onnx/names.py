"""Names that a reader of the model knows: of inputs, outputs and dimensions, and of nodes by their module."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter keeps a node's modules
_NOWHERE = "_empty_nn_module"  # what it calls the place of a node that no module made
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def name_ends(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the graph's inputs and outputs these names, in their order.

    An output that is an input, a weight or another output as well gets a node of its own.
    """
    taken = {*inputs, *outputs}
    for value in list(_values(graph)):  # initializers are kept by their names
        if value.name in taken:
            value.name = f"{value.name}_"
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for i, name in enumerate(outputs):
        value = graph.outputs[i]
        if value.producer() is None or any(value is earlier for earlier in graph.outputs[:i]):
            node = ir.node("Identity", [value], name=f"{name}/Identity")
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[i] = value = node.outputs[0]
        value.name = name


def name_dimensions(graph: ir.Graph) -> None:
    """Replace tracing's symbols by what the inputs' dimensions usually are: batch, sequence, tokens."""
    names = dict[str, str]()
    for value in graph.inputs:
        sizes = list(value.shape or ())
        for dim, size in enumerate(sizes):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and size.value not in names:
                wanted = _usual(value, dim, len(sizes))
                unique = wanted if wanted not in names.values() else f"{value.name}_{dim}"
                names[size.value] = unique
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b")
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbol, names) for size in value.shape])


def _usual(value: ir.Value, dim: int, rank: int) -> str:
    by_rank = {1: ("tokens",), 2: ("batch", "sequence"), 3: ("batch", "sequence")}
    names = ("tokens",) if rank == 2 and value.dtype not in _INTEGERS else by_rank.get(rank, ("batch",))
    return names[dim] if dim < len(names) else f"{value.name}_{dim}"


def _renamed(
    size: int | ir.SymbolicDim, symbol: re.Pattern[str], names: dict[str, str]
) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(symbol.sub(lambda found: names[found[0]], size.value))


def name_nodes(graph: ir.Graph) -> None:
    """Name every node of torch's by its module and what it is ("model.layers.1.mlp/MatMul"), its values so,
    and forget what else torch's exporter noted (the user's files among it).
    """
    ends = {value for value in (*graph.inputs, *graph.outputs)}
    seen = Counter[str]()
    for node in graph:
        scopes = node.metadata_props.pop(_SCOPES, None)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            modules = [m for m in ast.literal_eval(scopes)[:-1] if not m.startswith(_NOWHERE)]
            node.name = _unique(f"{modules[-1] if modules else ''}/{node.op_type}".lstrip("/"), seen)
            for i, value in enumerate(node.outputs):
                if value not in ends:
                    value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{i}"
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name] - 1}"


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
