"""Rules of dense experts whose dimension comes last, as stack(…, dim=-1) puts it, and of their products.

stack([expert(x) for …], dim=-1)              (T, D, E)
(stacked * dense.unsqueeze(-2)).sum(-1)       every expert's rows times their weights, summed
einsum("te,tde->td", dense, stacked)          the same
stacked @ dense.unsqueeze(-1)                 the same, (T, D, 1)
dense.unsqueeze(-2) @ stacked (T, E, D)       the same, (T, 1, D)
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import is_tensor, same_size, shape, value
from dsmoe_compiler.passes.lift.every_expert import same_experts
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import Combined, Everywhere, ExpertsLast, Rows, Value

_EXPANDS = ("aten::expand", "aten::expand_as")


def stack(lift: Lift, node: Node) -> Value | None:
    """stack([expert(x) for expert in experts], dim=-1)."""
    parts, rank = argument(node, "tensors"), len(shape(node))
    if argument(node, "dim") % rank != rank - 1 or len(parts) < 2 or rank < 3:
        return None
    width = shape(node)[-2]
    if not isinstance(width, int) or not value(node).is_floating_point():
        return None
    if any(lift.of(p) is not None or p.op != "call_function" for p in parts):
        return None
    term = same_experts(lift, list(enumerate(parts)))
    if term is None:
        return None
    return ExpertsLast(Rows(Everywhere(len(parts), rank - 2), term, rank - 1, (width,)))


def weights(lift: Lift, node: Node) -> Value | None:
    """dense weights (T, E).unsqueeze(-2)."""
    rows = _last_axis(lift.of(node.args[0]))
    if rows is None or rows.trail or argument(node, "dim") not in (-2, rows.lead - 1):
        return None
    return ExpertsLast(rows.like(rows.term, (1,)))


def turn(lift: Lift, node: Node) -> Value | None:
    """stacked.transpose(-1, -2), either way."""
    found, rank = lift.of(node.args[0]), len(shape(node))
    if operator_name(node) == "aten::permute":
        swaps = [d % rank for d in argument(node, "dims")] == [*range(rank - 2), rank - 1, rank - 2]
    else:
        dims = {d % rank for d in node.args[1:3] if isinstance(d, int)}
        swaps = dims == {rank - 1, rank - 2} or operator_name(node) == "aten::mT"
    if not swaps:
        return None
    if isinstance(found, ExpertsLast):
        return found.rows
    rows = _last_axis(found)
    return ExpertsLast(rows) if rows is not None and len(rows.trail) == 1 else None


def multiply(lift: Lift, node: Node) -> Value | None:
    """Two of them, element by element."""
    a, b = (_under(lift, operand) for operand in node.args[:2])
    if a is None or b is None or a.rows.domain != b.rows.domain or a.rows.lead != b.rows.lead:
        return None
    lead, widths = a.rows.lead - 1, {a.rows.width, b.rows.width} - {1}
    for operand in node.args[:2]:
        assert isinstance(operand, Node)
        if not all(map(same_size, shape(operand)[:lead], shape(node)[:lead])):
            return None
    width = widths.pop() if widths else 1
    if widths or not same_size(shape(node)[-2], width):
        return None
    return ExpertsLast(a.rows.like(lift.terms.number("mul", (a.rows.term, b.rows.term)), (width,)))


def sum_experts(lift: Lift, node: Node) -> Value | None:
    """The sum over the experts of what is weighed."""
    found, rank = lift.of(node.args[0]), len(shape(node)) + 1
    if not isinstance(found, ExpertsLast) or argument(node, "keepdim") or argument(node, "dtype") is not None:
        return None
    if [d % rank for d in argument(node, "dim") or []] != [rank - 1]:
        return None
    return Combined(found.rows) if lift.terms.leaves(found.rows.term, "pair") else None


def product(lift: Lift, node: Node) -> Value | None:
    """(…, D, E) @ (…, E, 1), (…, 1, E) @ (…, E, D): the sum over the experts of what is weighed."""
    left, right = lift.of(node.args[0]), _last_axis(lift.of(node.args[1]))
    if not isinstance(left, ExpertsLast) or right is None or len(right.trail) != 1:
        return None
    return _summed(lift, node, left.rows, right)


def einsum(lift: Lift, node: Node) -> Value | None:
    """einsum("te,tde->td", dense weights, stacked)."""
    inputs, _, out = str(argument(node, "equation")).replace(" ", "").partition("->")
    names, operands = inputs.split(","), argument(node, "tensors")
    if len(operands) != 2:
        return None
    at = 0 if len(names[0]) > len(names[1]) else 1
    many, few, found = names[at], names[1 - at], lift.of(operands[at])
    dense = _last_axis(lift.of(operands[1 - at]))
    if not isinstance(found, ExpertsLast) or dense is None or dense.trail:
        return None
    if len(set(many)) != len(many) or few != many[:-2] + many[-1] or out != many[:-1]:
        return None
    return _summed(lift, node, found.rows, dense)


def _summed(lift: Lift, node: Node, a: Rows, b: Rows) -> Combined | None:
    if a.domain != b.domain or a.lead != b.lead or 1 not in (a.width, b.width):
        return None
    for operand in node.all_input_nodes:
        if not all(map(same_size, shape(operand)[: a.lead - 1], shape(node))):
            return None
    term = lift.terms.number("mul", (a.term, b.term))
    return Combined(a.like(term, (max(a.width, b.width),))) if lift.terms.leaves(term, "pair") else None


def _last_axis(found: Value | None) -> Rows | None:
    """Rows whose last row dimension is the experts'."""
    if not isinstance(found, Rows) or not isinstance(found.domain, Everywhere) or found.lead < 2:
        return None
    return found if found.domain.axis == found.lead - 1 else None


def _under(lift: Lift, node: object) -> ExpertsLast | None:
    """The meaning of a value, or of what it repeats along the width."""
    if isinstance(node, Node) and node.op == "call_function" and operator_name(node) in _EXPANDS:
        below = node.args[0]
        assert isinstance(below, Node) and is_tensor(below)
        sizes, own = shape(node), shape(below)
        rows_stay = len(own) == len(sizes) and all(map(same_size, own[:-2], sizes[:-2]))
        node = below if rows_stay and same_size(own[-2], 1) and same_size(own[-1], sizes[-1]) else node
    found = lift.of(node)
    return found if isinstance(found, ExpertsLast) else None


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::stack": (stack,),
    "aten::unsqueeze": (weights,),
    "aten::transpose": (turn,),
    "aten::permute": (turn,),
    "aten::mT": (turn,),
    "aten::mul": (multiply,),
    "aten::sum": (sum_experts,),
    "aten::bmm": (product,),
    "aten::matmul": (product,),
    "aten::einsum": (einsum,),
}
