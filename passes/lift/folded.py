"""Rules of rows whose width is cut in equal parts by a view: (…, F) seen as (…, A, B).

h.view(n, 2, F)[:, 0]          one part of the width
h.view(n, F, 2).unbind(-1)     the even and the odd numbers of the width
h.view(n, A, B).amax(-1)       is not known: it has A numbers a row
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import same_size, shape, value
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument
from dsmoe_compiler.passes.lift.values import Folded, Parts, Rows, Value


def fold(lift: Lift, node: Node) -> Value | None:
    """A view that keeps the dimensions of the rows and cuts the width in two dimensions."""
    rows, sizes = lift.rows(node.args[0]), shape(node)
    if rows is None or rows.is_matrix or len(rows.trail) != 1 or len(sizes) != rows.lead + 2:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    if not all(map(same_size, sizes[: rows.lead], shape(source)[: rows.lead])):
        return None
    outer, inner = sizes[-2:]
    if not isinstance(outer, int) or not isinstance(inner, int) or outer * inner != rows.width:
        return None
    return Folded(rows, outer, inner)


def unfold(lift: Lift, node: Node) -> Value | None:
    """The view back."""
    found = lift.of(node.args[0])
    if not isinstance(found, Folded):
        return None
    source, lead = node.args[0], found.rows.lead
    assert isinstance(source, Node)
    same = len(shape(node)) == lead + 1 and same_size(shape(node)[-1], found.rows.width)
    return found.rows if same and all(map(same_size, shape(node)[:lead], shape(source)[:lead])) else None


def part(lift: Lift, node: Node) -> Value | None:
    """One entry of one of the two dimensions."""
    found = lift.of(node.args[0])
    return _part(lift, node, found, argument(node, "index")) if isinstance(found, Folded) else None


def parts(lift: Lift, node: Node) -> Value | None:
    """All entries of one of the two dimensions."""
    found = lift.of(node.args[0])
    if not isinstance(found, Folded):
        return None
    return Parts(tuple(_part(lift, node, found, i) for i in range(len(value(node)))))


def _part(lift: Lift, node: Node, found: Folded, index: int) -> Rows | None:
    rows, dim = found.rows, argument(node, "dim") % (found.rows.lead + 2) - found.rows.lead
    if dim == 0:
        start = index % found.outer * found.inner
        cut = (start, start + found.inner, 1)
    elif dim == 1:
        cut = (index % found.inner, rows.width, found.inner)
    else:
        return None
    width = found.inner if dim == 0 else found.outer
    return rows.like(lift.terms.number("slice", (rows.term,), cut), (width,))


_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::unflatten")
RULES: dict[str, tuple[Rule, ...]] = {
    **{name: (unfold, fold) for name in (*_VIEWS, "aten::flatten")},
    "aten::select": (part,),
    "aten::unbind": (parts,),
}
