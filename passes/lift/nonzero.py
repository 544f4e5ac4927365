"""Rules of code that asks dense weights which tokens an expert has: those whose weight is not 0.

dense[:, e] > 0, dense[:, e] != 0      a mask over tokens
dense[:, e].nonzero()                  their numbers

A chosen pair may weigh 0, too. So the mask is that of other ids: where(weight > 0, ids, -1), which become a
value of the graph.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, same_size, shape, value
from dsmoe_compiler.passes.lift.dense import as_dense, zero_filled
from dsmoe_compiler.passes.lift.masks import listed
from dsmoe_compiler.passes.lift.ranges import inside
from dsmoe_compiler.passes.lift.state import Lift, Rule, has_slots, operator_name
from dsmoe_compiler.passes.lift.values import Column, Everywhere, Kept, Mask, Parts, TokenOf, Value

_COMPARES = {"aten::gt": aten.gt.Scalar, "aten::ne": aten.ne.Scalar}


def compare(lift: Lift, node: Node) -> Value | None:
    """dense[:, e] > 0."""
    return _mask(lift, node.args[0], operator_name(node)) if node.args[1] == 0 else None


def truth(lift: Lift, node: Node) -> Value | None:
    """dense[:, e].bool()."""
    return _mask(lift, node.args[0], "aten::ne") if value(node).dtype is torch.bool else None


def coordinates(lift: Lift, node: Node) -> Value | None:
    """dense[:, e].nonzero()."""
    mask = _mask(lift, node.args[0], "aten::ne") if len(node.args) == 1 else None
    domain = listed(mask) if mask is not None else None
    if mask is None or domain is None or mask.axes != "T":
        return None
    return TokenOf(domain) if operator_name(node) == "aten::nonzero" else Parts((TokenOf(domain),))


def _mask(lift: Lift, column: object, compared: str) -> Mask | None:
    found = lift.of(column)
    if not isinstance(found, Column) or found.trail or not found.zero or not isinstance(column, Node):
        return None
    matrix = column.args[0]
    if operator_name(column) != "aten::select" or not isinstance(matrix, Node):
        return None
    chosen = _chosen(lift, matrix, compared)
    if chosen is None or (root := lift.ids_root(chosen)) is None or len(shape(chosen)) != 2:
        return None
    return Mask(*root, found.domain.expert, "T")


def _chosen(lift: Lift, matrix: Node, compared: str) -> Node | None:
    """where(weight is not 0, ids, -1) of dense weights (T, E), one value however many experts are asked."""
    rows = as_dense(lift, matrix)
    if rows is None or rows.domain != Everywhere(int(shape(matrix)[-1]), rows.lead - 1) or rows.trail:
        return None
    source = zero_filled(lift, rows)
    if source is None or (ids := source.ids) is None or not has_slots(ids):
        return None
    lead = len(shape(matrix)) - 1
    beside = len(shape(ids)) == lead + 1 and all(map(same_size, shape(ids)[:lead], shape(matrix)))
    if (
        not beside
        or value(ids).dtype is not torch.int64
        or not inside(lift.graph, ids, int(shape(matrix)[-1]))
    ):
        return None
    key = (ids, (matrix, compared))
    if key not in lift.restricted:
        hot = lift.make(_COMPARES[compared], (matrix, 0), value(matrix) != 0, (matrix,))
        kept = lift.make(aten.gather.default, (hot, -1, ids), value(ids) != 0, (hot,))
        lift.restricted[key] = lift.make(aten.where.ScalarOther, (kept, ids, -1), value(ids), (ids,))
        lift.kept[lift.restricted[key]] = Kept(ids, None)
    return lift.restricted[key]


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::gt": (compare,),
    "aten::ne": (compare,),
    "aten::to": (truth,),
    "aten::_to_copy": (truth,),
    "aten::nonzero": (coordinates,),
    "aten::nonzero_numpy": (coordinates,),
    "aten::where": (coordinates,),
}
