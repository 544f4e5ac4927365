"""Axes counted from the front, where a runtime wants them so."""

from __future__ import annotations

import onnx_ir as ir


def count_from_front(graph: ir.Graph) -> None:
    """`onnx.reference` gathers elements along axes from 0 on only.

    before: GatherElements(data, indices, axis=-1)      after: …, axis=1, of data with two dimensions
    """
    for node in graph:
        if node.op_type != "GatherElements" or node.domain:
            continue
        axis, data = node.attributes.get_int("axis", 0), node.inputs[0]
        if axis < 0 and data is not None and data.shape is not None:
            node.attributes["axis"] = ir.AttrInt64("axis", axis + len(data.shape))
