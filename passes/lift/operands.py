"""What stands beside rows in an operator that acts on each of them: how it is read as a term.

0.5                       a number
weights.unsqueeze(-1)     pair(w), one number a pair
bias[e], bias (E, 1, F)   a vector of each expert: expert(P), or own(p) where code visits one expert
norm.weight (F,)          shared(S), a vector that all experts read
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from dsmoe_compiler.ir.body import Attr
from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    Size,
    depends_on_data,
    dtype,
    is_tensor,
    same_size,
    shape,
    value,
)
from dsmoe_compiler.passes.lift.gather import is_pair_shaped
from dsmoe_compiler.passes.lift.state import Lift, PairSource, argument, operator_name
from dsmoe_compiler.passes.lift.values import GRIDS, OneExpert, Pairs, Rows

# Operators on one expert's vector that become part of the term, so that what is packed is the vector itself.
_ON_VECTORS = {f"aten::{name}": name for name in ("add", "sub", "mul", "neg", "exp")}


def joined(
    lift: Lift, node: Node, op: str, operands: Sequence[object], attrs: tuple[Attr, ...] = ()
) -> Rows | None:
    """The rows of an operator that acts on each number of its operands, at least one of which is rows."""
    found = [lift.rows(o) for o in operands]
    anchor = next((r for r in found if r is not None), None)
    if anchor is None:
        return None
    per_row = list[Node]()
    terms, trail, domain = list[int](), tuple(1 for _ in anchor.trail), anchor.domain
    for operand, rows in zip(operands, found, strict=True):
        if rows is None:
            rows = _beside(lift, operand, anchor, node, per_row)
        elif isinstance(operand, Node):
            per_row.append(operand)
        if rows is None or rows.is_matrix or rows.lead != anchor.lead:
            return None
        same, wider = domain.meet(rows.domain), _broadcast(trail, rows.trail)
        if same is None or wider is None:
            return None
        domain, trail = same, wider
        terms.append(rows.term)
    if not _keeps_rows(node, per_row, anchor.lead, trail):
        return None
    return Rows(domain, lift.terms.number(op, tuple(terms), attrs), anchor.lead, trail)


def _beside(lift: Lift, operand: object, anchor: Rows, node: Node, per_row: list[Node]) -> Rows | None:
    """An operand that is no rows, as if it were; `per_row` gains it where it has one entry a row."""
    if isinstance(operand, (int, float)):
        return anchor.like(lift.terms.number("const", (), (operand,)), tuple(1 for _ in anchor.trail))
    if not isinstance(operand, Node) or not is_tensor(operand):
        return None
    if operand in lift.fixed:
        return fixed_operand(lift, operand, anchor, node)
    if not lift.opaque(operand):
        return None
    per_row.append(operand)
    return _weight(lift, operand, anchor)


def _weight(lift: Lift, node: Node, anchor: Rows) -> Rows | None:
    """A routing weight beside rows: one opaque number per pair."""
    if not isinstance(anchor.domain, Pairs) or anchor.domain.order is not None:
        return None
    beyond = shape(node)[anchor.lead :]
    if len(shape(node)) < anchor.lead or not is_pair_shaped(node, anchor.domain):
        return None
    if not all(same_size(s, 1) for s in beyond):
        return None
    return anchor.like(lift.pair(PairSource(node)), tuple(1 for _ in beyond))


def fixed_operand(lift: Lift, operand: Node, anchor: Rows, node: Node) -> Rows | None:
    """A value of the model's own tensors alone beside rows: a vector of each expert, or one for all of them.

    It is aligned with the rows' last dimensions, as broadcasting does, and may not number rows.
    """
    sizes = _static(shape(operand))
    rank = anchor.lead + len(anchor.trail)
    if sizes is None or len(sizes) > rank or not value(operand).is_floating_point():
        return None
    if not sizes and dtype(operand) != dtype(node):
        return None  # a tensor of no dimension takes part in no promotion of types
    padded = (1,) * (rank - len(sizes)) + sizes
    lead, trail = padded[: anchor.lead], padded[anchor.lead :]
    if sum(s != 1 for s in trail) > 1:
        return None
    if all(size == 1 for size in lead):
        if isinstance(anchor.domain, OneExpert):
            term = own_vector(lift, operand, anchor.domain.expert)
        else:
            term = lift.share(operand)
        return None if term is None else anchor.like(term, trail)
    if not isinstance(anchor.domain, GRIDS) or anchor.lead != 2:
        return None
    axis = anchor.domain.axis
    if (lead[axis], lead[1 - axis]) != (anchor.domain.experts, 1):
        return None
    return anchor.like(_vector_of_each(lift, operand), trail)


def _vector_of_each(lift: Lift, node: Node) -> int:
    """The leaf of a tensor that has, dimensions of size 1 apart, the experts first and then their vectors."""
    while operator_name(node) == "aten::unsqueeze" or node.target in COPIES:
        below = node.args[0]
        assert isinstance(below, Node)
        if len(shape(below)) < 2:
            break
        node = below
    return lift.expert(node)


def own_vector(lift: Lift, node: object, expert: int) -> int | None:
    """The term of a vector or number of one expert, computed from its own tensors or given as one."""
    if isinstance(node, (int, float)):
        return lift.terms.number("const", (), (node,))
    if not isinstance(node, Node) or not is_tensor(node):
        return None
    if (
        (op := _ON_VECTORS.get(operator_name(node)))
        and argument(node, "alpha", 1) == 1
        and node in lift.fixed
    ):
        terms = [own_vector(lift, a, expert) for a in node.args]
        known = [t for t in terms if t is not None]
        return lift.terms.number(op, tuple(known)) if len(known) == len(terms) else None
    if node.target in CASTS and node in lift.fixed:
        below = own_vector(lift, node.args[0], expert)
        kind = str(dtype(node)).removeprefix("torch.")
        return None if below is None else lift.terms.number("cast", (below,), (kind,))
    found = lift.own_parameter(node, expert)
    return None if found is None or found[2] else found[0]


def _static(sizes: tuple[Size, ...]) -> tuple[int, ...] | None:
    return tuple(int(s) for s in sizes) if all(isinstance(s, int) for s in sizes) else None


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    if len(a) != len(b) or any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    trail = tuple(max(x, y) for x, y in zip(a, b, strict=True))
    return trail if sum(s != 1 for s in trail) <= 1 else None


def _keeps_rows(node: Node, per_row: Sequence[Node], lead: int, trail: tuple[int, ...]) -> bool:
    """The result has every operand's own row dimensions, then the width: no row was broadcast.

    Where how many rows there are was read from data, the rows' domain says that they are as many.
    """
    sizes = shape(node)
    if len(sizes) != lead + len(trail) or not all(map(same_size, sizes[lead:], trail)):
        return False
    return all(
        same_size(a, b) or depends_on_data(a) or depends_on_data(b)
        for operand in per_row
        for a, b in zip(sizes[:lead], shape(operand)[:lead], strict=True)
    )
