"""Rules of the products between rows and an expert's weight matrix.

grouped_mm(rows, P, offsets)       sorted rows, each with its expert's matrix
bmm(P[ids], row columns)           pairs in their own order, each with its gathered matrix
bmm(rows (E, T, D), P)             every token with every expert's matrix
linear(rows of expert e, P[e], b)  one expert's rows with its own matrix
linear(rows, S)                    any rows with a matrix that all experts share
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, dtype, is_tensor, same_size, shape
from dsmoe_compiler.passes.lift.gather import tokens_everywhere
from dsmoe_compiler.passes.lift.operands import fixed_operand
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
        return of_gathered(lift, a, b, column=True) if a.is_matrix else of_gathered(lift, b, a, column=False)
    return _everywhere(lift, left, right)


def _everywhere(lift: Lift, left: object, right: object) -> Rows | None:
    """Every token's rows (E, T, D) with every expert's matrix (E, D, F)."""
    a, weights = lift.rows(left), lift.expert_parameter(right)
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


def of_gathered(lift: Lift, matrix: Rows, rows: Rows, *, column: bool) -> Rows | None:
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


def linear(lift: Lift, node: Node) -> Value | None:
    """linear(rows, W, b), rows @ W, addmm(b, rows, W): W one expert's own, its entry, or all experts'."""
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
    if rows is None or len(rows.trail) != 1 or not isinstance(weight, Node):
        return None
    found = _matrix(lift, rows, weight)
    if found is None:
        return None
    leaf, sizes, flipped = found
    transposed = operator_name(node) == "aten::linear"
    width = sizes[(0 if transposed else 1) ^ flipped]
    op = "linear" if transposed != flipped else "matmul"
    made = rows.like(lift.terms.number(op, (rows.term, leaf)), (width,))
    if bias is None:
        return made
    vector = None
    if isinstance(bias, Node) and bias in lift.fixed:
        vector = fixed_operand(lift, bias, made, node)
    if vector is None or vector.width not in (1, width):
        return None
    return made.like(lift.terms.number("add", (made.term, vector.term)))


def _matrix(lift: Lift, rows: Rows, weight: Node) -> tuple[int, tuple[int, ...], bool] | None:
    """(leaf, shape, whether its dimensions are swapped) of a matrix that these rows meet."""
    if isinstance(rows.domain, OneExpert):
        found = lift.own_parameter(weight, rows.domain.expert)
        if found is not None and len(found[1]) == 2:
            return found
        because = f"{rows.domain.words} are multiplied by %{weight}, no tensor of the expert's own"
        raise Unproven("R301", because)
    shared = lift.expert_parameter(weight)
    if shared is None or len(shape(shared[0])) != 2:
        return None
    matrix, flipped = shared
    outer, inner = shape(matrix)
    assert isinstance(outer, int) and isinstance(inner, int)
    return lift.share(matrix), (outer, inner), flipped


def einsum_of_rows(lift: Lift, node: Node) -> Value | None:
    """einsum("nd,fd->nf", rows, W): as `linear`, the matrix either way around."""
    operands = argument(node, "tensors")
    inputs, arrow, out = str(argument(node, "equation")).replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(operands) != 2 or not arrow or not inputs.replace(",", "").isalpha():
        return None
    at = 0 if lift.rows(operands[0]) is not None else 1
    rows, weight = lift.rows(operands[at]), operands[1 - at]
    ours, matrix = names[at], names[1 - at]
    if rows is None or len(rows.trail) != 1 or len(matrix) != 2 or len(ours) != rows.lead + 1:
        return None
    inner = ours[-1]
    outer = matrix.replace(inner, "")
    if len(set(ours)) != len(ours) or len(outer) != 1 or outer in ours or out != ours[:-1] + outer:
        return None
    found = _matrix(lift, rows, weight)
    if found is None:
        return None
    leaf, sizes, flipped = found
    transposed = matrix == outer + inner
    width = sizes[(0 if transposed else 1) ^ flipped]
    op = "linear" if transposed != flipped else "matmul"
    return rows.like(lift.terms.number(op, (rows.term, leaf)), (width,))


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
    if rows is None and e not in other and len(other) > 1:
        rows = tokens_everywhere(lift, operands[1 - which], experts, len(other))
        other = e + other
    inner = other[-1]
    if rows is None or rows.lead < 2 or len(rows.trail) != 1 or not isinstance(rows.domain, GRIDS):
        return None
    if other.find(e) != rows.domain.axis or rows.domain.experts != experts or inner not in weights[1:]:
        return None
    outer = weights[2] if weights[1] == inner else weights[1]
    if e not in out or out[-1] != outer or out.replace(e, "") != other.replace(e, "")[:-1] + outer:
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


def biased(lift: Lift, node: Node) -> Value | None:
    """baddbmm(bias (E, 1, F), rows (E, T, D), W (E, D, F))."""
    bias, left, right = node.args[:3]
    if argument(node, "beta") != 1 or argument(node, "alpha") != 1 or bias not in lift.fixed:
        return None
    made = _everywhere(lift, left, right)
    assert isinstance(bias, Node)
    vector = None if made is None else fixed_operand(lift, bias, made, node)
    if made is None or vector is None:
        return None
    return made.like(lift.terms.number("add", (made.term, vector.term)))


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::_grouped_mm": (grouped,),
    "transformers::grouped_mm_fallback": (grouped,),
    "aten::bmm": (batched,),
    "aten::baddbmm": (biased,),
    "aten::linear": (linear,),
    "aten::mm": (linear,),
    "aten::addmm": (linear,),
    "aten::matmul": (linear, batched),
    "aten::einsum": (einsum_of_rows, einsum),
}
