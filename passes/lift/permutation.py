"""Rules of the permutation: sorting ids, finding tokens, counting, going back.

%s, %perm = sort(flatten(ids))        rows of Pairs(ids, K, order=%sort)
%perm // K                            the token of each row
cumsum(histc(%s, E, 0, E-1))          where each expert's rows end
scatter(arange, at=%perm)             the inverse permutation
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import CASTS, aten, dtype, same_size, shape
from dsmoe_compiler.passes.lift.ranges import never_negative
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Counts,
    Filled,
    InversePermutation,
    Offsets,
    OneHot,
    Pairs,
    Parts,
    Permutation,
    Range,
    Rows,
    Scratch,
    SortedIds,
    TokenOf,
    Value,
)

# Numbers of rows pass through these unharmed: half stops at 2048, bfloat16 at 256, bool at 1.
_INDICES = (torch.int32, torch.int64)
_EXACT = (*_INDICES, torch.float32, torch.float64)


def sort(lift: Lift, node: Node) -> Value | None:
    """sort(flat ids) -> (ids ascending, permutation); argsort gives the permutation alone."""
    ids = node.args[0]
    assert isinstance(ids, Node)
    only_indices = "argsort" in str(node.target)
    if isinstance(inner := lift.of(ids), Permutation):
        if not isinstance(inner.domain, Pairs):
            return None
        if argument(node, "descending"):
            raise Unproven("R402", "the inverse permutation is sorted in descending order, back to front")
        inverse = InversePermutation(inner.domain)
        return inverse if only_indices else Parts((None, inverse))
    root = lift.ids_root(ids)
    if root is None or len(shape(ids)) != 1:
        return None
    if argument(node, "descending"):
        raise Unproven(
            "R401", "the ids are sorted in descending order, and the offsets of grouped products ascend"
        )
    domain = Pairs(*root, order=node)
    return Permutation(domain) if only_indices else Parts((SortedIds(domain), Permutation(domain)))


def token_of(lift: Lift, node: Node) -> Value | None:
    """permutation // K -> the token of each row."""
    permutation, divisor = lift.of(node.args[0]), node.args[1]
    if not isinstance(permutation, Permutation) or not isinstance(divisor, int):
        return None
    if "floor_divide" not in str(node.target) and argument(node, "rounding_mode") not in ("floor", "trunc"):
        return None
    if divisor != permutation.domain.slots:
        raise Unproven(
            "R403", f"tokens are gathered at pair // {divisor}, each token has {permutation.domain.slots} ids"
        )
    return TokenOf(permutation.domain)


def integer_cast(lift: Lift, node: Node) -> Value | None:
    """A cast of routing integers keeps their meaning while it keeps their value."""
    found = lift.of(node.args[0])
    if isinstance(found, OneHot):
        source = node.args[0]
        assert isinstance(source, Node)
        exact = found.weight is None or torch.promote_types(dtype(source), dtype(node)) == dtype(node)
        return found if exact else None
    if isinstance(found, (SortedIds, Counts, Offsets)):
        return found if dtype(node) in _EXACT else None
    if isinstance(found, (Permutation, InversePermutation, TokenOf, Range)):
        return found if dtype(node) in _INDICES else None
    return None


def count(lift: Lift, node: Node) -> Value | None:
    """histc(ids, E, 0, E-1), bincount(ids, minlength=E) -> how many rows each expert has."""
    ids = node.args[0]
    assert isinstance(ids, Node)
    if "histc" in str(node.target):
        bins, low, high = argument(node, "bins"), argument(node, "min"), argument(node, "max")
        if low != 0 or high != bins - 1:
            return None
        experts = int(bins)
    else:
        if argument(node, "weights") is not None or not isinstance(shape(node)[0], int):
            return None
        experts = int(argument(node, "minlength"))
    root = _counted_ids(lift, ids)
    return None if root is None else Counts(root, experts)


def _counted_ids(lift: Lift, node: Node) -> Node | None:
    if isinstance(found := lift.of(node), SortedIds):
        return found.domain.ids
    if node.target in CASTS and dtype(node) in _EXACT:
        below = node.args[0]
        return _counted_ids(lift, below) if isinstance(below, Node) else None
    root = lift.ids_root(node)
    return None if root is None else root[0]


def offsets(lift: Lift, node: Node) -> Value | None:
    """cumsum(counts) -> where each expert's rows end."""
    counts = lift.of(node.args[0])
    if isinstance(counts, Counts) and argument(node, "dim") in (0, -1) and dtype(node) in _EXACT:
        return Offsets(counts.ids, counts.experts)
    return None


def offsets_by_search(lift: Lift, node: Node) -> Value | None:
    """searchsorted(ids ascending, arange(E), right=True) -> where each expert's rows end."""
    ids, experts = lift.of(node.args[0]), node.args[1]
    right = argument(node, "right") or argument(node, "side") == "right"
    if not isinstance(experts, Node) or not isinstance(lift.of(experts), Range):
        return None
    size = shape(experts)[0]
    if not isinstance(ids, SortedIds) or not right or not isinstance(size, int):
        return None
    assert ids.domain.ids is not None
    if not never_negative(lift.graph, ids.domain.ids):
        raise Unproven("R401", "ids that may be negative are searched for, which hands them to expert 0")
    return Offsets(ids.domain.ids, size)


def invert(lift: Lift, node: Node) -> Value | None:
    """scratch[permutation] = arange -> its inverse; scratch[permutation] = rows -> the rows as pairs."""
    if "index_put" in str(node.target):
        indices = argument(node, "indices")
        if len(indices) != 1 or argument(node, "accumulate"):
            return None
        at, written = indices[0], node.args[2]
    else:
        if argument(node, "dim") not in (0, -1) or node.target is not aten.scatter.src:
            return None
        at, written = node.args[2], node.args[3]
    position, content = lift.of(at), lift.of(written)
    if not isinstance(position, Permutation) or not isinstance(lift.of(node.args[0]), (Scratch, Filled)):
        return None
    if not isinstance(position.domain, Pairs) or not _every_pair(lift, node, at):
        return None
    if isinstance(content, Range) and _every_pair(lift, written, at):
        return InversePermutation(position.domain)
    if isinstance(content, Rows) and content.lead == 1 and content.domain == position.domain:
        return content.like(content.term, domain=Pairs(position.domain.ids, position.domain.slots))
    return None


def _every_pair(lift: Lift, written: object, at: object) -> bool:
    """Whether a tensor has a row for every entry of the permutation: by size, or as the sum of all counts."""
    assert isinstance(written, Node) and isinstance(at, Node)
    if same_size(shape(written)[0], shape(at)[0]):
        return True
    found = lift.of(at)
    assert isinstance(found, Permutation) and found.domain.ids is not None
    return lift.counts_every_pair(shape(written)[0], found.domain.ids)


def scratch(lift: Lift, node: Node) -> Value | None:
    """empty, empty_like."""
    return Scratch()


def filled(lift: Lift, node: Node) -> Value | None:
    """zeros, ones, full and their forms by example."""
    number = argument(node, "fill_value", int("ones" in operator_name(node)))
    return Filled(float(number)) if isinstance(number, (int, float)) else None


def count_up(lift: Lift, node: Node) -> Value | None:
    """arange(n)."""
    from_zero = argument(node, "start", 0) == 0 and argument(node, "step", 1) == 1
    return Range() if from_zero else None


def pick(lift: Lift, node: Node) -> Value | None:
    """getitem on a value with several parts."""
    parts, index = lift.of(node.args[0]), node.args[1]
    if isinstance(parts, Parts) and isinstance(index, int) and index < len(parts.items):
        return parts.items[index]
    return None


def flat_routing_view(lift: Lift, node: Node) -> Value | None:
    """A view of a vector as a vector."""
    found = lift.of(node.args[0])
    if (
        isinstance(found, (SortedIds, Permutation, InversePermutation, TokenOf, Range))
        and len(shape(node)) == 1
    ):
        return found
    return None


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::sort": (sort,),
    "aten::argsort": (sort,),
    "aten::floor_divide": (token_of,),
    "aten::div": (token_of,),
    "aten::to": (integer_cast,),
    "aten::_to_copy": (integer_cast,),
    "aten::type_as": (integer_cast,),
    "aten::histc": (count,),
    "aten::bincount": (count,),
    "aten::cumsum": (offsets,),
    "aten::searchsorted": (offsets_by_search,),
    "aten::index_put": (invert,),
    "aten::scatter": (invert,),
    "aten::empty_like": (scratch,),
    "aten::empty": (scratch,),
    "aten::new_empty": (scratch,),
    "aten::zeros_like": (filled,),
    "aten::zeros": (filled,),
    "aten::new_zeros": (filled,),
    "aten::ones_like": (filled,),
    "aten::ones": (filled,),
    "aten::new_ones": (filled,),
    "aten::full": (filled,),
    "aten::new_full": (filled,),
    "aten::full_like": (filled,),
    "aten::arange": (count_up,),
    "getitem": (pick,),
    "aten::view": (flat_routing_view,),
    "aten::reshape": (flat_routing_view,),
}
