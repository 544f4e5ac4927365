"""Rules that extend a row's term: what is pointwise, or moves a row's numbers, and leaves the rows alone.

One rule per shape of operator, not per operator: the tables say which body operator an ATen operator is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from dsmoe_compiler.ir.body import OPERATORS, Attr
from dsmoe_compiler.ir.graph import Size, dtype, is_tensor, same_size, shape, value
from dsmoe_compiler.passes.lift.operands import joined
from dsmoe_compiler.passes.lift.state import Lift, NotStatic, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import GRIDS, OneExpert, Pairs, Parts, Rows, Value

UNARY = {
    f"aten::{name}": name
    for name in (
        *("neg", "abs", "sign", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt"),
        *("reciprocal", "sin", "cos", "atan", "erf", "tanh", "sigmoid", "log_sigmoid", "relu", "silu"),
        *("mish", "selu", "hardswish", "hardsigmoid"),
    )
}
WITH_NUMBERS = {
    f"aten::{name}": name
    for name in (
        *("leaky_relu", "elu", "celu", "threshold", "softshrink", "hardshrink", "softplus", "nan_to_num"),
    )
}
THREE = {"aten::addcmul": "addcmul", "aten::addcdiv": "addcdiv"}
BINARY = {
    "aten::add": "add",
    "aten::sub": "sub",
    "aten::mul": "mul",
    "aten::div": "div",
    "aten::minimum": "minimum",
    "aten::maximum": "maximum",
    "aten::gt": "gt",
    "aten::ge": "ge",
    "aten::lt": "lt",
    "aten::le": "le",
    "aten::eq": "eq",
    "aten::ne": "ne",
}
TRUTH = {
    "aten::logical_and": "logical_and",
    "aten::bitwise_and": "logical_and",
    "aten::__and__": "logical_and",
    "aten::logical_or": "logical_or",
    "aten::bitwise_or": "logical_or",
    "aten::__or__": "logical_or",
    "aten::logical_not": "logical_not",
    "aten::bitwise_not": "logical_not",
}
_WHOLE = 2**62  # a slice's stop at or past this means "to the end"


def unary(lift: Lift, node: Node) -> Value | None:
    """One row in, one row out, no attributes."""
    rows = lift.rows(node.args[0])
    return _applied(lift, rows, UNARY[operator_name(node)]) if rows else None


def gelu(lift: Lift, node: Node) -> Value | None:
    """gelu, exact or by tanh."""
    rows = lift.rows(node.args[0])
    return (
        _applied(lift, rows, "gelu_tanh" if argument(node, "approximate") == "tanh" else "gelu")
        if rows
        else None
    )


def with_numbers(lift: Lift, node: Node) -> Value | None:
    """One row in, one row out, the operator's other arguments numbers."""
    rows, op = lift.rows(node.args[0]), WITH_NUMBERS[operator_name(node)]
    if rows is None:
        return None
    numbers = [argument(node, name) for name in OPERATORS[op].attrs]
    known = all(n is None or _is_number(n) for n in numbers)
    return _applied(lift, rows, op, tuple(numbers)) if known else None


def power(lift: Lift, node: Node) -> Value | None:
    """rows ** number, number ** rows, rows ** rows."""
    rows, exponent = lift.rows(node.args[0]), node.args[1]
    if rows is None or not isinstance(exponent, (int, float)):
        return joined(lift, node, "power", node.args)
    return _applied(lift, rows, "pow", (exponent,))


def square(lift: Lift, node: Node) -> Value | None:
    """rows ** 2."""
    rows = lift.rows(node.args[0])
    return _applied(lift, rows, "pow", (2,)) if rows else None


def clamp(lift: Lift, node: Node) -> Value | None:
    """clamp, clamp_min, clamp_max by numbers."""
    rows = lift.rows(node.args[0])
    low, high = argument(node, "min"), argument(node, "max")
    if rows is None or not all(b is None or _is_number(b) for b in (low, high)):
        return None
    return _applied(lift, rows, "clamp", (low, high))


def hardtanh(lift: Lift, node: Node) -> Value | None:
    """hardtanh, relu6: a clamp."""
    rows = lift.rows(node.args[0])
    bounds = (0, 6)
    if operator_name(node) == "aten::hardtanh":
        bounds = (argument(node, "min_val"), argument(node, "max_val"))
    return _applied(lift, rows, "clamp", bounds) if rows else None


def cast(lift: Lift, node: Node) -> Value | None:
    """A change of dtype stays in the term: precision is part of what the model computes."""
    rows = lift.rows(node.args[0])
    if rows is None or not value(node).is_floating_point():
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    if value(source).dtype == value(node).dtype:
        return rows
    return _applied(lift, rows, "cast", (str(value(node).dtype).removeprefix("torch."),))


def binary(lift: Lift, node: Node) -> Value | None:
    """Two operands: rows, numbers, routing weights, vectors of the experts."""
    op, alpha = BINARY[operator_name(node)], argument(node, "alpha", 1)
    if argument(node, "rounding_mode"):
        return None
    if alpha == 1:
        return joined(lift, node, op, node.args[:2])
    return None if op != "add" else joined(lift, node, "add_scaled", node.args[:2], (alpha,))


def extreme_of_two(lift: Lift, node: Node) -> Value | None:
    """max(rows, rows), min(rows, rows)."""
    if len(node.args) != 2 or not is_tensor(node.args[1]):
        return None
    return joined(lift, node, "maximum" if operator_name(node) == "aten::max" else "minimum", node.args)


def of_three(lift: Lift, node: Node) -> Value | None:
    """addcmul, addcdiv, lerp."""
    if operator_name(node) == "aten::lerp":
        return joined(lift, node, "lerp", node.args)
    return joined(lift, node, THREE[operator_name(node)], node.args[:3], (argument(node, "value"),))


def truth(lift: Lift, node: Node) -> Value | None:
    """Of two truth values or one: both, either, not."""
    operands = [a for a in node.args if is_tensor(a)]
    if not all(isinstance(a, Node) and dtype(a) == torch.bool for a in operands):
        return None
    return joined(lift, node, TRUTH[operator_name(node)], node.args)


def where(lift: Lift, node: Node) -> Value | None:
    """where(truth of each number, rows, rows)."""
    return joined(lift, node, "where", node.args) if len(node.args) == 3 else None


def masked_fill(lift: Lift, node: Node) -> Value | None:
    """A number where the truth holds, the rows elsewhere."""
    rows, truth_of_each, number = node.args
    if lift.rows(rows) is None or not isinstance(number, (int, float)):
        return None
    return joined(lift, node, "where", (truth_of_each, number, rows))


def prelu(lift: Lift, node: Node) -> Value | None:
    """x where it is positive, else x times a weight: one number, or one for each of the width."""
    rows, weight = lift.rows(node.args[0]), node.args[1]
    if rows is None or not isinstance(weight, Node) or not is_tensor(weight):
        return None
    if shape(weight) != (1,) and (rows.lead, shape(weight)) != (1, rows.trail):
        return None
    scaled = joined(lift, node, "mul", node.args)
    if scaled is None:
        return None
    positive = lift.terms.number("gt", (rows.term, lift.terms.number("const", (), (0,))))
    return scaled.like(lift.terms.number("where", (positive, rows.term, scaled.term)))


def reversed_sub(lift: Lift, node: Node) -> Value | None:
    """number - rows."""
    rows, number = lift.rows(node.args[0]), node.args[1]
    if rows is None or not isinstance(number, (int, float)) or argument(node, "alpha", 1) != 1:
        return None
    constant = lift.terms.number("const", (), (number,))
    return rows.like(lift.terms.number("sub", (constant, rows.term)))


def take_slice(lift: Lift, node: Node) -> Value | None:
    """A slice of the width becomes part of the term; a slice of the rows must be the whole."""
    rows = lift.rows(node.args[0])
    if rows is None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    dim = argument(node, "dim") % len(shape(source))
    start, stop, step = argument(node, "start") or 0, argument(node, "end"), argument(node, "step")
    if dim < rows.lead:
        whole = start == 0 and step == 1 and (stop is None or (isinstance(stop, int) and stop >= _WHOLE))
        return rows if whole else None
    width = rows.trail[dim - rows.lead]
    stop = width if stop is None else stop
    if rows.is_matrix or width != rows.width or not all(isinstance(s, int) for s in (start, stop, step)):
        return None
    return _sliced(lift, rows, dim, *_bounds(start, stop, width), step)


def _bounds(start: int, stop: int, width: int) -> tuple[int, int]:
    start, stop = (s + width if s < 0 else s for s in (start, stop))
    return min(max(start, 0), width), min(max(stop, 0), width)


def _sliced(lift: Lift, rows: Rows, dim: int, start: int, stop: int, step: int) -> Rows:
    at = dim - rows.lead
    if (start, stop, step) == (0, rows.trail[at], 1):
        return rows
    trail = (*rows.trail[:at], max(0, -(-(stop - start) // step)), *rows.trail[at + 1 :])
    return rows.like(lift.terms.number("slice", (rows.term,), (start, stop, step)), trail)


def split(lift: Lift, node: Node) -> Value | None:
    """chunk, split, split_with_sizes, unbind-like cuts of the width."""
    rows = lift.rows(node.args[0])
    if rows is None or rows.is_matrix:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    dim = argument(node, "dim") % len(shape(source))
    if dim < rows.lead or rows.trail[dim - rows.lead] != rows.width:
        return None
    parts, start = list[Value | None](), 0
    for part in value(node):
        stop = start + int(part.shape[dim])
        parts.append(_sliced(lift, rows, dim, start, stop, 1))
        start = stop
    return Parts(tuple(parts))


def concatenate(lift: Lift, node: Node) -> Value | None:
    """cat of rows along the width, two at a time."""
    parts = [lift.rows(a) for a in argument(node, "tensors")]
    rows = [r for r in parts if r is not None and not r.is_matrix]
    if not rows or len(rows) != len(parts):
        return None
    whole = rows[0]
    if argument(node, "dim") % len(shape(node)) != whole.lead + len(whole.trail) - 1:
        return None
    for part in rows[1:]:
        domain = whole.domain.meet(part.domain)
        if domain is None or whole.lead != part.lead or whole.trail[:-1] != part.trail[:-1]:
            return None
        trail = (*whole.trail[:-1], whole.trail[-1] + part.trail[-1])
        whole = Rows(domain, lift.terms.number("concat", (whole.term, part.term)), whole.lead, trail)
    return whole if whole.trail[-1] == whole.width else None


def copy(lift: Lift, node: Node) -> Value | None:
    """clone, contiguous, dropout that does nothing."""
    if "dropout" in operator_name(node) and argument(node, "train") and argument(node, "p"):
        return None
    return lift.rows(node.args[0])


def view(lift: Lift, node: Node) -> Value | None:
    """A view that keeps each row in one piece: rows are renumbered, dimensions of size 1 come and go."""
    rows = lift.rows(node.args[0])
    if rows is None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    old, new = shape(source), shape(node)
    if rows.is_matrix:
        return rows if len(old) == len(new) and all(map(same_size, old, new)) else None
    for lead in _leads(rows, old, new):
        trail = new[lead:]
        if all(isinstance(s, int) for s in trail) and _product(trail) == rows.width and _one_piece(trail):
            return Rows(rows.domain, rows.term, lead, tuple(int(s) for s in trail))
    sorted_rows = isinstance(rows.domain, Pairs) and rows.domain.order is not None
    if sorted_rows and len(new) > len(old) and same_size(new[-1], old[-1]):
        raise Unproven("R402", "rows sorted by expert are split as if they were in their tokens' order")
    return None


def _leads(rows: Rows, old: tuple[Size, ...], new: tuple[Size, ...]) -> list[int]:
    """How many leading dimensions of the new shape may number the rows, likeliest first."""
    found = []
    if len(new) >= rows.lead and all(map(same_size, old[: rows.lead], new[: rows.lead])):
        found.append(rows.lead)
    if isinstance(rows.domain, GRIDS):
        if rows.lead == 1 and len(new) > 1 and same_size(new[0], rows.domain.experts):
            found.append(2)
        if rows.lead >= 2 and rows.domain.axis == 0:
            found += [1, 2] if rows.lead == 3 and same_size(new[0], rows.domain.experts) else [1]
        groups = getattr(rows.domain, "groups", None)
        if rows.lead == 2 and groups is not None and len(new) > 3 and rows.domain.axis == 0:
            found += [3] if same_size(new[0], rows.domain.experts) and same_size(new[1], groups) else []
    elif isinstance(rows.domain, OneExpert):
        found += [1] if rows.lead > 1 else []
    elif rows.domain.order is None:
        if rows.lead > 1:
            found.append(1)
        found += [
            n for n in range(2, len(new) + 1) if same_size(new[n - 1], rows.domain.slots) and n not in found
        ]
    return found


def unsqueeze(lift: Lift, node: Node) -> Value | None:
    """A new dimension of size 1 within a row."""
    rows = lift.rows(node.args[0])
    if rows is None or rows.is_matrix:
        return None
    at = argument(node, "dim") % (rows.lead + len(rows.trail) + 1) - rows.lead
    return rows.like(rows.term, (*rows.trail[:at], 1, *rows.trail[at:])) if at >= 0 else None


def squeeze(lift: Lift, node: Node) -> Value | None:
    """A dimension of size 1 within a row goes."""
    source = node.args[0]
    rows = lift.rows(source)
    dims = argument(node, "dim")
    if rows is None or dims is None:
        return None
    assert isinstance(source, Node)
    rank = rows.lead + len(rows.trail)
    if isinstance(rows.domain, OneExpert) and rows.lead == 2 and dims in (0, [0]):
        return replace(rows, lead=1) if shape(source)[0] == 1 else None
    gone = {d % rank - rows.lead for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if any(at < 0 for at in gone):
        return None
    return rows.like(rows.term, tuple(s for i, s in enumerate(rows.trail) if i not in gone or s != 1))


def transpose(lift: Lift, node: Node) -> Value | None:
    """Swapping dimensions within a row, or the tokens and experts of dense weights."""
    rows = lift.rows(node.args[0])
    if rows is None:
        return None
    rank = rows.lead + len(rows.trail)
    order = list(range(rank))
    if operator_name(node) == "aten::permute":
        order = [d % rank for d in argument(node, "dims")]
    elif operator_name(node) == "aten::transpose":
        i, j = (d % rank for d in node.args[1:3] if isinstance(d, int))
        order[i], order[j] = j, i
    else:
        order[-2:] = order[:-3:-1]
    swaps = rows.lead >= 2 and order == [1, 0, *range(2, rank)]
    if swaps and isinstance(rows.domain, GRIDS) and rows.domain.axis < 2:
        return rows.like(rows.term, domain=replace(rows.domain, axis=1 - rows.domain.axis))
    if order[: rows.lead] != list(range(rows.lead)):
        return None
    trail = tuple(rows.trail[d - rows.lead] for d in order[rows.lead :])
    if rows.is_matrix:
        if len(rows.trail) != 2:
            return None
        return Rows(rows.domain, rows.term, rows.lead, trail, rows.flipped ^ (order[rows.lead] != rows.lead))
    return rows.like(rows.term, trail)


def _applied(lift: Lift, rows: Rows, op: str, attrs: tuple[Attr, ...] = ()) -> Rows | None:
    if rows.is_matrix and op != "cast":
        return None
    return rows.like(lift.terms.number(op, (rows.term,), attrs))


def _is_number(argument: object) -> bool:
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def _product(sizes: tuple[Size, ...]) -> int:
    product = 1
    for size in sizes:
        if not isinstance(size, int):
            raise NotStatic
        product *= size
    return product


def _one_piece(sizes: tuple[Size, ...]) -> bool:
    return sum(not same_size(s, 1) for s in sizes) <= 1


RULES: dict[str, tuple[Rule, ...]] = {
    **{name: (unary,) for name in UNARY},
    **{name: (binary,) for name in BINARY},
    **{name: (truth,) for name in TRUTH},
    **{name: (with_numbers,) for name in WITH_NUMBERS},
    "aten::where": (where,),
    "aten::masked_fill": (masked_fill,),
    "aten::prelu": (prelu,),
    "aten::hardtanh": (hardtanh,),
    "aten::relu6": (hardtanh,),
    "aten::rsub": (reversed_sub,),
    "aten::gelu": (gelu,),
    "aten::max": (extreme_of_two,),
    "aten::min": (extreme_of_two,),
    "aten::lerp": (of_three,),
    **{name: (of_three,) for name in THREE},
    "aten::pow": (power,),
    "aten::square": (square,),
    "aten::clamp": (clamp,),
    "aten::clip": (clamp,),
    "aten::clamp_min": (clamp,),
    "aten::clamp_max": (clamp,),
    "aten::to": (cast,),
    "aten::_to_copy": (cast,),
    "aten::type_as": (cast,),
    "aten::slice": (take_slice,),
    "aten::chunk": (split,),
    "aten::split": (split,),
    "aten::split_with_sizes": (split,),
    "aten::cat": (concatenate,),
    "aten::clone": (copy,),
    "aten::detach": (copy,),
    "aten::contiguous": (copy,),
    "aten::dropout": (copy,),
    "aten::alpha_dropout": (copy,),
    "aten::view": (view,),
    "aten::reshape": (view,),
    "aten::_unsafe_view": (view,),
    "aten::flatten": (view,),
    "aten::unsqueeze": (unsqueeze,),
    "aten::squeeze": (squeeze,),
    "aten::transpose": (transpose,),
    "aten::permute": (transpose,),
    "aten::t": (transpose,),
    "aten::mT": (transpose,),
}
