"""Guards against NaN go where there can be none, and stay where there can."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx_ir")

import numpy as np
import onnx_ir as ir

from dsmoe_compiler.export.onnx.softmax_guards import drop_softmax_guards


def _guarded(masked: float, *, mask_is_constant: bool = True) -> ir.Graph:
    """Where(IsNaN(s), 0, s) of s = Softmax(scores + Where(mask, 0, masked))."""
    scores, mask, other = (ir.Value(name=name) for name in ("scores", "mask", "other"))
    zero, low = (_scalar(name, number) for name, number in (("zero", 0.0), ("low", masked)))
    bias = ir.node("Where", [mask, zero, low if mask_is_constant else other])
    added = ir.node("Add", [scores, bias.outputs[0]])
    softmax = ir.node("Softmax", added.outputs)
    is_nan = ir.node("IsNaN", softmax.outputs)
    guard = ir.node("Where", [is_nan.outputs[0], zero, softmax.outputs[0]])
    nodes = [bias, added, softmax, is_nan, guard]
    return ir.Graph([scores, mask, other], guard.outputs, nodes=nodes, initializers=[zero, low])


def _scalar(name: str, number: float) -> ir.Value:
    tensor = ir.tensor(np.array(number, np.float32), name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype))


def _kinds(graph: ir.Graph) -> list[str]:
    drop_softmax_guards(graph)
    return [node.op_type for node in graph]


def test_a_finite_mask_needs_no_guard() -> None:
    graph = _guarded(float(np.finfo(np.float32).min))
    assert _kinds(graph) == ["Where", "Add", "Softmax"]
    producer = graph.outputs[0].producer()
    assert producer is not None and producer.op_type == "Softmax"


@pytest.mark.parametrize("masked", [float("-inf"), float("nan")])
def test_another_mask_keeps_it(masked: float) -> None:
    assert _kinds(_guarded(masked)).count("Where") == 2


def test_a_mask_of_unknown_numbers_keeps_it() -> None:
    assert _kinds(_guarded(-1.0, mask_is_constant=False)).count("Where") == 2
