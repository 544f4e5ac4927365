"""Conditions read as they are: masks of routers are written for what they leave out, and then turned."""

from __future__ import annotations

import onnx_ir as ir


def turn_conditions(graph: ir.Graph) -> None:
    """before: Where(Not(c), a, b)      after: Where(c, b, a)"""
    for node in list(graph):
        condition = node.inputs[0].producer() if node.op_type == "Where" and node.inputs[0] else None
        if condition is None or condition.op_type != "Not" or condition.domain or node.domain:
            continue
        _, chosen, other = node.inputs
        for place, value in enumerate((condition.inputs[0], other, chosen)):
            node.replace_input_with(place, value)
        if not condition.outputs[0].uses() and not condition.outputs[0].is_graph_output():
            graph.remove(condition, safe=True)
