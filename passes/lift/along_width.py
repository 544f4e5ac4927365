"""Rules of operators along a row's width: sums and the like, softmax, norms.

x.pow(2).mean(-1, keepdim=True)    one number a row
softmax(x, -1)                     each number by all of its row
layer_norm(x, (F,), weight, bias)  weight and bias all experts', one expert's own, or none
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import shape
from dsmoe_compiler.passes.lift.operands import fixed_operand
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import Parts, Rows, Value

_REDUCTIONS = ("sum", "mean", "amax", "amin", "logsumexp")
_ORDER = {"aten::linalg_vector_norm": "ord", "aten::linalg_norm": "ord", "aten::norm": "p"}


def reduce(lift: Lift, node: Node) -> Value | None:
    """sum, mean, amax, amin, logsumexp over the width."""
    rows = lift.rows(node.args[0])
    name = operator_name(node).removeprefix("aten::")
    return _reduced(lift, node, _as_kind(lift, node, rows), name) if rows else None


def extreme(lift: Lift, node: Node) -> Value | None:
    """max(-1), min(-1): the values are rows, where they stand is not known."""
    rows = lift.rows(node.args[0])
    if rows is None or argument(node, "dim") is None:
        return None
    op = "amax" if operator_name(node) == "aten::max" else "amin"
    return Parts((_reduced(lift, node, rows, op), None))


def norm(lift: Lift, node: Node) -> Value | None:
    """The p-norm over the width; 2 where no p is given."""
    rows, order = lift.rows(node.args[0]), argument(node, _ORDER[operator_name(node)])
    order = 2 if order is None else order
    if rows is None or not isinstance(order, (int, float)):
        return None
    return _reduced(lift, node, _as_kind(lift, node, rows), "norm", (order,))


def spread(lift: Lift, node: Node) -> Value | None:
    """var, std over the width; var_mean gives both."""
    rows, correction = lift.rows(node.args[0]), argument(node, "correction", 1)
    unbiased = argument(node, "unbiased")
    if rows is None or argument(node, "dim") is None:
        return None
    if unbiased is not None:
        correction = int(unbiased)
    correction = 1 if correction is None else correction
    name = operator_name(node).removeprefix("aten::")
    found = _reduced(lift, node, rows, "std" if name.startswith("std") else "var", (correction,))
    return Parts((found, _reduced(lift, node, rows, "mean"))) if name.endswith("_mean") else found


def softmax(lift: Lift, node: Node) -> Value | None:
    """softmax, log_softmax over the width."""
    rows = lift.rows(node.args[0])
    if rows is None or not _is_width(rows, [argument(node, "dim")]):
        return None
    kind = _as_kind(lift, node, rows)
    return kind.like(lift.terms.number(operator_name(node).removeprefix("aten::"), (kind.term,)))


def glu(lift: Lift, node: Node) -> Value | None:
    """The first half of the width times the sigmoid of the second."""
    rows = lift.rows(node.args[0])
    if rows is None or not _is_width(rows, [argument(node, "dim")]) or rows.trail[-1] != rows.width:
        return None
    return rows.like(lift.terms.number("glu", (rows.term,)), (*rows.trail[:-1], rows.width // 2))


def widen(lift: Lift, node: Node) -> Value | None:
    """One number a row, repeated over a width."""
    rows = lift.rows(node.args[0])
    if rows is None or rows.width != 1 or len(shape(node)) != rows.lead + len(rows.trail):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    if [str(s) for s in shape(node)[: rows.lead]] != [str(s) for s in shape(source)[: rows.lead]]:
        return None
    trail = tuple(s for s in shape(node)[rows.lead :] if isinstance(s, int))
    if len(trail) != len(rows.trail) or sum(s != 1 for s in trail) != 1:
        return None
    return rows.like(lift.terms.number("expand", (rows.term,), (max(trail),)), trail)


def layer_norm(lift: Lift, node: Node) -> Value | None:
    """layer_norm over the whole width."""
    return _normed(lift, node, "layer_norm", (("weight", 1), ("bias", 0)))


def rms_norm(lift: Lift, node: Node) -> Value | None:
    """rms_norm over the whole width."""
    return _normed(lift, node, "rms_norm", (("weight", 1),))


def group_norm(lift: Lift, node: Node) -> Value | None:
    """group_norm of rows (n, F): the width, in groups."""
    rows = lift.rows(node.args[0])
    if rows is None or (rows.lead, rows.trail) != (1, (rows.width,)):
        return None
    found = _affine(lift, node, rows, (("weight", 1), ("bias", 0)))
    numbers = argument(node, "num_groups"), argument(node, "eps")
    return None if found is None else rows.like(lift.terms.number("group_norm", found, numbers))


def _normed(lift: Lift, node: Node, op: str, vectors: tuple[tuple[str, int], ...]) -> Value | None:
    rows, width = lift.rows(node.args[0]), argument(node, "normalized_shape")
    if rows is None or rows.is_matrix or not rows.trail or list(width) != [rows.width]:
        return None
    if rows.trail[-1] != rows.width:
        return None
    found = _affine(lift, node, rows, vectors)
    return None if found is None else rows.like(lift.terms.number(op, found, (argument(node, "eps"),)))


def _affine(
    lift: Lift, node: Node, rows: Rows, vectors: tuple[tuple[str, int], ...]
) -> tuple[int, ...] | None:
    """The rows' term and those of a norm's vectors, a number where there is none."""
    terms = [rows.term]
    for name, absent in vectors:
        given = argument(node, name)
        if given is None:
            terms.append(lift.terms.number("const", (), (absent,)))
            continue
        vector = fixed_operand(lift, given, rows, node) if given in lift.fixed else None
        if vector is None or vector.width != rows.width:
            return None
        terms.append(vector.term)
    return tuple(terms)


def _reduced(lift: Lift, node: Node, rows: Rows, op: str, attrs: tuple[int | float, ...] = ()) -> Rows | None:
    dims = argument(node, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    if not _is_width(rows, dims):
        return None
    at = dims[0] % (rows.lead + len(rows.trail)) - rows.lead
    kept = (1,) if argument(node, "keepdim") else ()
    return rows.like(
        lift.terms.number(op, (rows.term,), attrs), (*rows.trail[:at], *kept, *rows.trail[at + 1 :])
    )


def _is_width(rows: Rows, dims: list[object]) -> bool:
    """Whether these dimensions are the one along which a row's numbers lie."""
    if rows.is_matrix or len(dims) != 1 or not isinstance(dims[0], int) or not rows.trail:
        return False
    at = dims[0] % (rows.lead + len(rows.trail)) - rows.lead
    return at >= 0 and rows.trail[at] == rows.width


def _as_kind(lift: Lift, node: Node, rows: Rows) -> Rows:
    """The rows in the dtype that the operator is asked to compute in."""
    kind = argument(node, "dtype")
    if kind is None:
        return rows
    return rows.like(lift.terms.number("cast", (rows.term,), (str(kind).removeprefix("torch."),)))


RULES: dict[str, tuple[Rule, ...]] = {
    **{f"aten::{name}": (reduce,) for name in _REDUCTIONS},
    **{name: (norm,) for name in _ORDER},
    **{f"aten::{name}": (spread,) for name in ("var", "std", "var_mean", "std_mean")},
    "aten::max": (extreme,),
    "aten::min": (extreme,),
    "aten::softmax": (softmax,),
    "aten::log_softmax": (softmax,),
    "aten::glu": (glu,),
    "aten::expand": (widen,),
    "aten::expand_as": (widen,),
    "aten::layer_norm": (layer_norm,),
    "aten::group_norm": (group_norm,),
    "aten::rms_norm": (rms_norm,),
}
