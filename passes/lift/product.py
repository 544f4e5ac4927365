"""Rules of the products between rows and an expert's weight matrix.

grouped_mm(rows, P, offsets)       sorted rows, each with its expert's matrix
bmm(P[ids], row columns)           pairs in their own order, each with its gathered matrix
bmm(rows (E, T, D), P)             every token with every expert's matrix
linear(rows of expert e, P[e], b)   one expert's rows with its own matrix
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, dtype, is_tensor, same_size, shape
from dsmoe_compiler.passes.lift.gather import tokens_everywhere
from dsmoe_compiler.passes.lift.ranges import require_counted
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import GRIDS, Offsets, OneExpert, Pairs, Rows, Value


def grouped(lift: Lift, node: Node) -> Value | None:
    """grouped_mm(sorted rows (P, in), weights (E, in, out), offsets)."""
    rows, weights = lift.rows(node.args[0]), lift.expert_parameter(node.args[1])
    ends = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    if rows is None or weights is None or not isinstance(rows.domain, Pairs):
        return None
    if node.target is aten._grouped_mm.default and argument(node, "bias") is not None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    if dtype(node) != dtype(source) or len(shape(weights[0])) != 3:
        return None
    offsets = lift.of(ends)
    if rows.domain.order is None or not isinstance(offsets, Offsets) or offsets.ids is not rows.domain.ids:
        raise Unproven("R401", "the group offsets are not the counts of the ids that the rows were sorted by")
    parameter, flipped = weights
    if not same_size(shape(parameter)[0], offsets.experts):
        raise Unproven(
            "R401", f"{offsets.experts} experts are counted, the weights hold {shape(parameter)[0]}"
        )
    if rows.lead != 1 or len(rows.trail) != 1:
        return None
    require_counted(lift.graph, offsets.ids, offsets.experts)
    width = shape(parameter)[1 if flipped else 2]
    assert isinstance(width, int)
    return _product(lift, rows, parameter, "linear" if flipped else "matmul", (width,))


def batched(lift: Lift, node: Node) -> Value | None:
    """bmm or matmul of rows with gathered matrices, or of every token with every expert's matrix."""
    left, right = node.args[0], node.args[1]
    a, b = lift.rows(left), lift.rows(right)
    if a is not None and b is not None and a.is_matrix != b.is_matrix:
        if not _same_rows(node, left, right, a.lead):
            return None
        return _gathered(lift, a, b, column=True) if a.is_matrix else _gathered(lift, b, a, column=False)
    weights = lift.expert_parameter(right)
    if weights is None or len(shape(weights[0])) != 3:
        return None
    parameter, flipped = weights
    experts = shape(parameter)[0]
    if a is None and isinstance(experts, int) and is_tensor(left):
        assert isinstance(left, Node)
        a = tokens_everywhere(lift, left, experts)
    if a is None or not isinstance(a.domain, GRIDS) or (a.lead, len(a.trail)) != (2, 1):
        return None
    if (a.domain.experts, a.domain.axis) != (int(experts), 0):
        return None
    width = shape(parameter)[1 if flipped else 2]
    assert isinstance(width, int)
    return _product(lift, a, parameter, "linear" if flipped else "matmul", (width,))


def _same_rows(node: Node, left: object, right: object, lead: int) -> bool:
    """Whether both operands have the product's own row dimensions: matmul would broadcast a single row."""
    assert isinstance(left, Node) and isinstance(right, Node)
    return all(map(same_size, shape(node)[:lead] * 2, shape(left)[:lead] + shape(right)[:lead]))


def _gathered(lift: Lift, matrix: Rows, rows: Rows, *, column: bool) -> Rows | None:
    """P[e] · column, P[e] being (out, in) as gathered; or row · P[e], it being (in, out)."""
    domain = matrix.domain.meet(rows.domain)
    if domain is None or matrix.lead != rows.lead or len(matrix.trail) != 2 or len(rows.trail) != 2:
        return None
    if rows.trail != ((matrix.trail[1], 1) if column else (1, matrix.trail[0])):
        return None
    out = matrix.trail[0] if column else matrix.trail[1]
    op = "linear" if column != matrix.flipped else "matmul"
    term = lift.terms.number(op, (rows.term, matrix.term))
    return Rows(domain, term, rows.lead, (out, 1) if column else (1, out))


def own_linear(lift: Lift, node: Node) -> Value | None:
    """linear(rows, P[e], b[e]), rows @ P[e], addmm(b[e], rows, P[e]): one expert's rows with its tensors."""
    match operator_name(node), node.args:
        case "aten::linear", (source, weight, *rest):
            bias = rest[0] if rest else argument(node, "bias")
        case (("aten::matmul" | "aten::mm"), (source, weight)):
            bias = None
        case "aten::addmm", (bias, source, weight) if not node.kwargs:
            pass
        case _:
            return None
    rows = lift.rows(source)
    if rows is None or not isinstance(rows.domain, OneExpert) or len(rows.trail) != 1:
        return None
    found = lift.own_parameter(weight, rows.domain.expert)
    if found is None or len(found[1]) != 2:
        raise Unproven(
            "R301", f"{rows.domain.words} are multiplied by %{weight}, no tensor of the expert's own"
        )
    leaf, sizes, flipped = found
    transposed = operator_name(node) == "aten::linear"
    op = "linear" if transposed != flipped else "matmul"
    term = lift.terms.number(op, (rows.term, leaf))
    width = sizes[(0 if transposed else 1) ^ flipped]
    if bias is not None:
        vector = lift.own_parameter(bias, rows.domain.expert)
        if vector is None or vector[1] != (width,):
            return None
        term = lift.terms.number("add", (term, vector[0]))
    return rows.like(term, (width,))


def own_vector(lift: Lift, node: Node) -> Value | None:
    """rows + b[e], rows * s[e]: one expert's rows with a vector of its own."""
    op = _VECTORS[operator_name(node)]
    if argument(node, "alpha", 1) != 1 or argument(node, "rounding_mode"):
        return None
    for rows_at, vector_at in ((0, 1), (1, 0)):
        rows, vector = lift.rows(node.args[rows_at]), node.args[vector_at]
        if rows is None or not isinstance(rows.domain, OneExpert) or not is_tensor(vector):
            continue
        found = lift.own_parameter(vector, rows.domain.expert)
        if found is None or found[1] != rows.trail:
            continue
        operands = (rows.term, found[0]) if rows_at == 0 else (found[0], rows.term)
        return rows.like(lift.terms.number(op, operands))
    return None


def einsum(lift: Lift, node: Node) -> Value | None:
    """einsum of every token with every expert's matrix: "td,edf->etf", "etf,efd->etd", "…->te…" likewise."""
    operands = argument(node, "tensors")
    inputs, arrow, out = str(argument(node, "equation")).replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(operands) != 2 or not arrow:
        return None
    which = next((i for i, o in enumerate(operands) if lift.expert_parameter(o) is not None), None)
    if which is None:
        return None
    parameter, flipped = lift.expert_parameter(operands[which])  # type: ignore[misc]
    weights, other = names[which], names[1 - which]
    experts = shape(parameter)[0]
    if len(weights) != 3 or not isinstance(experts, int) or any(len(set(n)) != len(n) for n in (*names, out)):
        return None
    e = weights[0]
    rows = lift.rows(operands[1 - which])
    if rows is None and e not in other and len(other) == 2:
        rows = tokens_everywhere(lift, operands[1 - which], experts)
        other = e + other
    inner = other[-1]
    if rows is None or rows.lead != 2 or len(rows.trail) != 1 or not isinstance(rows.domain, GRIDS):
        return None
    if other.find(e) != rows.domain.axis or rows.domain.experts != experts or inner not in weights[1:]:
        return None
    outer = weights[2] if weights[1] == inner else weights[1]
    token = other[1 - rows.domain.axis]
    if len(out) != 3 or set(out) != {e, token, outer} or out[-1] != outer:
        return None
    if shape(operands[which])[weights.index(inner)] != rows.width:
        return None
    op = "linear" if (weights[2] == inner) != flipped else "matmul"
    width = shape(operands[which])[weights.index(outer)]
    assert isinstance(width, int)
    turned = replace(rows.domain, axis=out.index(e))
    return _product(lift, rows.like(rows.term, domain=turned), parameter, op, (width,))


def _product(lift: Lift, rows: Rows, parameter: Node, op: str, trail: tuple[int, ...]) -> Rows:
    return rows.like(lift.terms.number(op, (rows.term, lift.expert(parameter))), trail)


def expert_bias(lift: Lift, node: Node) -> Value | None:
    """rows (E, T, F) + bias (E, 1, F), rows (T, E, F) + bias (E, F): an expert's vector a row."""
    for rows_at, bias_at in ((0, 1), (1, 0)):
        rows, bias = lift.rows(node.args[rows_at]), node.args[bias_at]
        if rows is None or not isinstance(rows.domain, GRIDS) or not isinstance(bias, Node):
            continue
        vector = _beside(bias, rows.domain.axis)
        found = None if vector is None else lift.expert_parameter(vector)
        if found is None or found[1] or rows.lead != 2 or argument(node, "alpha", 1) != 1:
            continue
        if shape(found[0]) == (rows.domain.experts, *rows.trail) and len(shape(node)) == 3:
            return rows.like(lift.terms.number("add", (rows.term, lift.expert(found[0]))))
    return None


def _beside(bias: Node, axis: int) -> Node | None:
    """The (E, F) value under dimensions of size 1 that put its experts on `axis` of three."""
    if bias.target is aten.unsqueeze.default and argument(bias, "dim") % len(shape(bias)) == 1 - axis:
        below = bias.args[0]
        return below if isinstance(below, Node) else None
    return bias if axis == 1 and is_tensor(bias) and len(shape(bias)) == 2 else None


_VECTORS = {"aten::add": "add", "aten::sub": "sub", "aten::mul": "mul", "aten::div": "div"}
RULES: dict[str, tuple[Rule, ...]] = {
    "aten::_grouped_mm": (grouped,),
    "transformers::grouped_mm_fallback": (grouped,),
    "aten::bmm": (batched,),
    "aten::linear": (own_linear,),
    "aten::mm": (own_linear,),
    "aten::addmm": (own_linear,),
    "aten::matmul": (own_linear, batched),
    "aten::einsum": (einsum,),
    "aten::add": (expert_bias, own_vector),
    "aten::sub": (own_vector,),
    "aten::mul": (own_vector,),
    "aten::div": (own_vector,),
}
