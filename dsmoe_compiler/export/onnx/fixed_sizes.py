"""Sizes that tracing left open and the model's code then fixed: torch's exporter writes them as names."""

from __future__ import annotations

import onnx_ir as ir


def number_fixed_sizes(graph: ir.Graph) -> None:
    """before: input_ids (batch, "12")      after: input_ids (batch, 12)"""
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_numbered(size) for size in value.shape])


def _numbered(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None or not size.value.isdecimal():
        return size
    return int(size.value)
