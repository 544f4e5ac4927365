"""A layer's nodes as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.name_lists import fold_names
from dsmoe_compiler.ir.printer import (
    LayerNodes,
    LayerText,
    is_assertion,
    is_scalar,
    layer_text,
    operator_text,
)
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.drawing.layer_graph import Given, LayerGraph, Operator, Parameter, Role


def describe(
    graph: ProgramGraph,
    layer: LayerNodes,
    roles: Mapping[Node, Role],
    lost: Node | None = None,
    spec: MoESpec | None = None,
    op: Node | None = None,
) -> LayerGraph:
    """The layer's inputs, operators and text; `lost` is where understanding ended, `op` what is `spec`."""
    text = layer_text(graph, layer)
    checks = [n for n in layer.nodes if is_assertion(n)]
    data = [n for n in layer.nodes if n in text.lines]
    return LayerGraph(
        tuple(Given(text.names[n], text.types[n]) for n in layer.inputs if n in text.lines),
        tuple(
            Operator(
                text.names[n],
                operator_text(n),
                text.types[n],
                roles[n],
                tuple(text.names[a] for a in _operands(n) if a in text.lines),
                tuple(Parameter(*text.parameters[a]) for a in n.all_input_nodes if a in text.parameters),
                text.lines[n],
                n is lost,
                spec if n is op else None,
                _lists(n, text) if n is op else (),
            )
            for n in data
        ),
        tuple(text.names[r] for r in layer.results if r in text.names),
        sum(is_scalar(n) for n in layer.nodes),
        len(checks),
        text.text,
    )


def _lists(op: Node, text: LayerText) -> tuple[tuple[str, tuple[Parameter, ...]], ...]:
    """A fused op's lists of parameters; parameters that were packed into one are one."""
    schema: Any = getattr(op.target, "_schema", None)
    given = zip((a.name for a in schema.arguments), op.args, strict=False)
    return tuple(
        (name, tuple(_parameter(n, text) for n in value if isinstance(n, Node)))
        for name, value in given
        if isinstance(value, (list, tuple)) and value
    )


def _parameter(node: Node, text: LayerText) -> Parameter:
    if node in text.parameters:
        return Parameter(*text.parameters[node])
    names = [text.parameters[n][0] for n in node.all_input_nodes if n in text.parameters]
    return Parameter(", ".join(fold_names(names)) or text.names[node], text.types[node])


def _operands(node: Node) -> list[Node]:
    """The nodes a node reads, in order, one that is read twice twice."""
    found = list[Node]()

    def add(value: Any) -> None:
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)

    for value in (*node.args, *node.kwargs.values()):
        add(value)
    return found
