"""Rules of the permutation: sorting ids, finding tokens, counting, going back.

    %s, %perm = sort(flatten(ids))        rows of Pairs(ids, K, order=%sort)
    %perm // K                            the token of each row
    cumsum(histc(%s, E, 0, E-1))          where each expert's rows end
    scatter(arange, at=%perm)             the inverse permutation
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import dtype, shape, value
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven, argument
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

# Integers a floating dtype holds exactly: half stops at 2048, bfloat16 at 256, below the number of experts or rows.
_EXACT = ("torch.float32", "torch.float64")


def sort(lift: Lift, node: Node) -> Value | None:
    """sort(flat ids) -> (ids ascending, permutation); argsort gives the permutation alone."""
    ids = node.args[0]
    assert isinstance(ids, Node)
    only_indices = "argsort" in str(node.target)
    if isinstance(inner := lift.of(ids), Permutation):
        inverse = InversePermutation(inner.domain)
        return inverse if only_indices else Parts((None, inverse))
    root = lift.ids_root(ids)
    if root is None or len(shape(ids)) != 1:
        return None
    if argument(node, "descending"):
        raise Unproven("R401", "the ids are sorted in descending order, and the offsets of grouped products ascend")
    domain = Pairs(*root, order=node)
    return Permutation(domain) if only_indices else Parts((SortedIds(domain), Permutation(domain)))


def token_of(lift: Lift, node: Node) -> Value | None:
    """permutation // K -> the token of each row."""
    permutation, divisor = lift.of(node.args[0]), node.args[1]
    if not isinstance(permutation, Permutation) or not isinstance(divisor, int):
        return None
    floors = argument(node, "rounding_mode", "floor") in ("floor", "trunc")
    if not floors:
        return None
    if divisor != permutation.domain.slots:
        raise Unproven("R403", f"tokens are gathered at pair // {divisor}, each token has {permutation.domain.slots} ids")
    return TokenOf(permutation.domain)


def integer_cast(lift: Lift, node: Node) -> Value | None:
    """A cast of routing integers keeps their meaning while it keeps their value."""
    found = lift.of(node.args[0])
    if isinstance(found, (SortedIds, Permutation, InversePermutation, TokenOf, Counts, Offsets, OneHot, Range)):
        if value(node).is_floating_point() and not isinstance(found, OneHot) and str(dtype(node)) not in _EXACT:
            return None
        return found
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
    if value(node).is_floating_point() and str(dtype(node)) in _EXACT and node.op == "call_function":
        below = node.args[0]
        return _counted_ids(lift, below) if isinstance(below, Node) else None
    root = lift.ids_root(node)
    return None if root is None else root[0]


def offsets(lift: Lift, node: Node) -> Value | None:
    """cumsum(counts) -> where each expert's rows end."""
    counts = lift.of(node.args[0])
    if isinstance(counts, Counts) and argument(node, "dim") in (0, -1):
        return Offsets(counts.ids, counts.experts)
    return None


def offsets_by_search(lift: Lift, node: Node) -> Value | None:
    """searchsorted(ids ascending, arange(E), right=True) -> where each expert's rows end."""
    ids, experts = lift.of(node.args[0]), node.args[1]
    assert isinstance(experts, Node)
    right = argument(node, "right") or argument(node, "side") == "right"
    size = shape(experts)[0]
    if isinstance(ids, SortedIds) and isinstance(lift.of(experts), Range) and right and isinstance(size, int):
        assert ids.domain.ids is not None
        return Offsets(ids.domain.ids, size)
    return None


def invert(lift: Lift, node: Node) -> Value | None:
    """scratch[permutation] = arange -> the inverse; scratch[permutation] = rows -> the rows in their pairs' order."""
    if "index_put" in str(node.target):
        indices = argument(node, "indices")
        if len(indices) != 1 or argument(node, "accumulate"):
            return None
        position, written = lift.of(indices[0]), node.args[2]
    else:
        if argument(node, "dim") not in (0, -1):
            return None
        position, written = lift.of(node.args[2]), node.args[3]
    if not isinstance(position, Permutation) or not isinstance(lift.of(node.args[0]), (Scratch, Filled)):
        return None
    content = lift.of(written)
    if isinstance(content, Range):
        return InversePermutation(position.domain)
    if isinstance(content, Rows) and content.lead == 1 and content.domain == position.domain:
        return content.like(content.term, domain=Pairs(position.domain.ids, position.domain.slots))
    return None


def scratch(lift: Lift, node: Node) -> Value | None:
    """empty, empty_like."""
    return Scratch()


def filled(lift: Lift, node: Node) -> Value | None:
    """zeros, full and their _like forms."""
    number = argument(node, "fill_value", 0)
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
    if isinstance(found, (SortedIds, Permutation, InversePermutation, TokenOf, Range)) and len(shape(node)) == 1:
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
    "aten::full": (filled,),
    "aten::full_like": (filled,),
    "aten::arange": (count_up,),
    "getitem": (pick,),
    "aten::view": (flat_routing_view,),
    "aten::reshape": (flat_routing_view,),
}
