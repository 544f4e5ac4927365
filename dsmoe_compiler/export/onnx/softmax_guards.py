"""Guards against NaN after a softmax that has none."""

from __future__ import annotations

import onnx_ir as ir


def drop_softmax_guards(graph: ir.Graph) -> None:
    """torch's exporter replaces NaN after the softmax of masked attention by 0, on numbers of every head and
    pair of positions. A row has NaN where all of it is masked by −∞; masked by a finite number it has none
    but what its scores bring, and that is what torch gives, too.

    before: s = Softmax(scores + Where(mask, 0, −3.4e38));  y = Where(IsNaN(s), 0, s)      after: y = s
    """
    for node in list(graph):
        if not _is(node, "Where"):
            continue
        guard, softmax = _producer(node, 0), _producer(node, 2)
        if _is(guard, "IsNaN") and _is(softmax, "Softmax") and _producer(guard, 0) is softmax:
            scores = _producer(softmax, 0)
            if _is(scores, "Add") and any(_is_finite_mask(_producer(scores, i)) for i in (0, 1)):
                _take_out(graph, node, guard, softmax)


def _take_out(graph: ir.Graph, node: ir.Node, guard: ir.Node | None, softmax: ir.Node | None) -> None:
    assert guard is not None and softmax is not None
    node.outputs[0].replace_all_uses_with(softmax.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if not guard.outputs[0].uses() and not guard.outputs[0].is_graph_output():
        graph.remove(guard, safe=True)


def _is_finite_mask(node: ir.Node | None) -> bool:
    """Whether a value is one of two finite numbers everywhere."""
    return node is not None and _is(node, "Where") and all(map(_is_finite, node.inputs[1:]))


def _is_finite(value: ir.Value | None) -> bool:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size != 1:
        return False
    number = float(tensor.numpy().reshape(()))
    return number - number == 0.0


def _producer(node: ir.Node | None, which: int) -> ir.Node | None:
    value = node.inputs[which] if node is not None else None
    return value.producer() if value is not None else None


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.op_type == op_type and not node.domain
