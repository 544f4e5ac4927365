"""Rules of code that cuts sorted rows into one segment an expert, by counts read on the host.

    n = counts.tolist()                   n[e]: how many pairs chose expert e
    rows[start : start + n[e]]            the rows of expert e, where start is n[0] + … + n[e-1]
    rows.split(n)                         all of them
    offsets = counts.cumsum(0).tolist()   the same by sums of counts

Sizes are compared as expressions: every symbol that a count or an offset was read into stands for a sum of
the symbols count(ids, e), so that any arithmetic on the host is understood.
"""

from __future__ import annotations

from typing import cast

import sympy
import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import shape, value
from dsmoe_compiler.passes.lift.discover import require_distinct
from dsmoe_compiler.passes.lift.ranges import handed_in, never_negative
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven, argument, count_of, operator_name
from dsmoe_compiler.passes.lift.values import (
    Count,
    Counts,
    Filled,
    MultiHot,
    Offsets,
    OneExpert,
    OneHot,
    Pairs,
    Parts,
    Permutation,
    Rows,
    SortedIds,
    TokenOf,
    Value,
)


def read_count(lift: Lift, node: Node) -> Value | None:
    """counts[e].item(): gives the symbol its meaning; the number itself is no value of a row."""
    found, size = lift.of(node.args[0]), node.meta.get("val")
    if isinstance(found, Count) and isinstance(size, torch.SymInt):
        counts = (count_of(found.ids, e) for e in range(found.first, found.stop))
        lift.sizes[size.node.expr] = sympy.Add(*counts)
    return None


def entry(lift: Lift, node: Node) -> Value | None:
    """counts[e], offsets[e]."""
    found = lift.of(node.args[0])
    if not isinstance(found, (Counts, Offsets)) or argument(node, "dim") not in (0, -1):
        return None
    index: int = argument(node, "index")
    return _entries(lift, found)[index]


def entries(lift: Lift, node: Node) -> Value | None:
    """All counts or offsets, one by one."""
    found = lift.of(node.args[0])
    return Parts(_entries(lift, found)) if isinstance(found, (Counts, Offsets)) else None


def difference(lift: Lift, node: Node) -> Value | None:
    """offsets[e] - offsets[e - 1]: a count."""
    end, start = lift.of(node.args[0]), lift.of(node.args[1])
    if not isinstance(end, Count) or not isinstance(start, Count) or argument(node, "alpha", 1) != 1:
        return None
    inside = end.ids is start.ids and end.first == start.first and start.stop < end.stop
    return Count(end.ids, start.stop, end.stop) if inside else None


def _entries(lift: Lift, found: Counts | Offsets) -> tuple[Count, ...]:
    lift.counted[found.ids] = found.experts
    offsets = isinstance(found, Offsets)
    return tuple(Count(found.ids, 0 if offsets else e, e + 1) for e in range(found.experts))


def narrow(lift: Lift, node: Node) -> Value | None:
    """rows.narrow(0, start, n), rows[start:stop]: one expert's segment of what is sorted."""
    if argument(node, "dim") != 0:
        return None
    start = lift.extent(argument(node, "start") or 0)
    if operator_name(node) == "aten::narrow":
        length = lift.extent(argument(node, "length"))
    else:
        stop = argument(node, "end")
        if argument(node, "step") != 1 or stop is None:
            return None
        length = lift.extent(stop) - start
    return _segment(lift, lift.of(node.args[0]), start, length)


def split(lift: Lift, node: Node) -> Value | None:
    """rows.split(counts): the segments of all experts."""
    found, sizes = lift.of(node.args[0]), argument(node, "split_sizes")
    if argument(node, "dim") != 0 or not isinstance(sizes, (list, tuple)) or found is None:
        return None
    parts, start = list[Value | None](), cast(sympy.Expr, sympy.Integer(0))
    for size in sizes:
        length = lift.extent(size)
        parts.append(_segment(lift, found, start, length))
        start += length
    return Parts(tuple(parts)) if any(part is not None for part in parts) else None


def _segment(lift: Lift, found: Value | None, start: sympy.Expr, length: sympy.Expr) -> Value | None:
    if not isinstance(found, (Rows, TokenOf, Permutation)) or not isinstance(found.domain, Pairs):
        return None
    pairs = found.domain
    if pairs.ids is None or pairs.order is None or (isinstance(found, Rows) and found.lead != 1):
        return None
    experts = lift.counted.get(pairs.ids, 0) if length.is_Symbol else 0
    expert = next((e for e in range(experts) if length == count_of(pairs.ids, e)), None)
    if expert is None or start != sympy.Add(*(count_of(pairs.ids, i) for i in range(expert))):
        return None
    if not never_negative(lift.graph, pairs.ids) and not handed_in(lift.graph, pairs.ids):
        raise Unproven(
            "R401", f"%{pairs.ids.name} may hold numbers below 0, which are sorted before expert 0's"
        )
    domain = OneExpert(pairs.ids, pairs.slots, expert, pairs.order)
    if isinstance(found, Rows):
        return found.like(found.term, domain=domain)
    return TokenOf(domain) if isinstance(found, TokenOf) else Permutation(domain)


def count_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot(ids).sum over all but the experts, and the like: how many pairs chose each expert."""
    found = lift.of(node.args[0])
    dims, keep = argument(node, "dim"), argument(node, "keepdim")
    if isinstance(found, MultiHot):
        require_distinct(found.ids)
        rank = len(shape(node)) + len(dims or [])
        counted = sorted(d % rank for d in dims or []) == list(range(rank - 1))
    elif isinstance(found, OneHot) and found.weight is None and not value(node).is_floating_point():
        rank = len(found.axes)
        left = [a for i, a in enumerate(found.axes) if i not in {d % rank for d in dims or range(rank)}]
        counted = left == ["E"]
    else:
        return None
    if not counted or keep:
        return None
    root = lift.ids_root(found.ids)
    return None if root is None else Counts(root[0], found.experts)


def count_by_adding(lift: Lift, node: Node) -> Value | None:
    """zeros(E).index_add(0, ids, ones): how many pairs chose each expert."""
    start, ones, at = lift.of(node.args[0]), lift.of(node.args[3]), node.args[2]
    if not isinstance(start, Filled) or not isinstance(ones, Filled) or not isinstance(at, Node):
        return None
    experts = shape(node)[0]
    if (start.number, ones.number) != (0, 1) or not isinstance(experts, int) or len(shape(node)) != 1:
        return None
    if isinstance(sorted_ids := lift.of(at), SortedIds) and sorted_ids.domain.ids is not None:
        return Counts(sorted_ids.domain.ids, experts)
    root = lift.ids_root(at)
    return None if root is None else Counts(root[0], experts)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::item": (read_count,),
    "aten::_local_scalar_dense": (read_count,),
    "aten::sub": (difference,),
    "aten::select": (entry,),
    "aten::unbind": (entries,),
    "aten::narrow": (narrow,),
    "aten::slice": (narrow,),
    "aten::split_with_sizes": (split,),
    "aten::split": (split,),
    "aten::sum": (count_hot,),
    "aten::index_add": (count_by_adding,),
}
