"""What it would take for a refused layer to fuse, from where its meaning ended."""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.errors import REMEDIES
from dsmoe_compiler.ir.graph import is_tensor
from dsmoe_compiler.passes.lift import values
from dsmoe_compiler.passes.lift.gather import is_pair_shaped
from dsmoe_compiler.passes.lift.losses import Lost
from dsmoe_compiler.passes.lift.state import Lift, argument, operator_name
from dsmoe_compiler.passes.lift.values import Everywhere, OneExpert, Pairs, Rows

_PRODUCTS = frozenset(
    f"aten::{name}" for name in ("bmm", "mm", "matmul", "linear", "einsum", "addmm", "baddbmm", "_grouped_mm")
)
_MOVES_ROWS = frozenset(
    f"aten::{name}"
    for name in ("view", "reshape", "transpose", "permute", "slice", "select", "flip", "roll", "t")
)
_ADDS_ROWS = frozenset({"aten::index_add", "aten::scatter_add", "aten::index_put", "aten::scatter_reduce"})
# By code and operator, where that says more than the code alone.
_OF_OPERATOR: dict[tuple[str, str], str] = {
    ("R401", "aten::sort"): "sort the ids in ascending order",
    ("R401", "aten::searchsorted"): "search ids that are not negative: drop other pairs by their weight",
    ("R402", "aten::view"): "bring the rows back with perm.argsort(), perm being the permutation that "
    "sorted them, before splitting them by token",
    ("R402", "aten::index"): "use the inverse of the permutation that sorted the rows: perm.argsort()",
    ("R402", "aten::argsort"): "sort the permutation in ascending order: perm.argsort()",
    ("R402", "aten::index_add"): "add each row at its own token: perm // K, perm being the permutation "
    "that sorted the rows",
}


# By code, where the rows are those of one expert in a loop.
_OF_LOOPS = {
    "R402": "put or add an expert's rows at the tokens of the mask that they were read by",
    "R407": "add the rows to what their tokens hold: out.index_add_(0, tokens, rows), or out[tokens] += rows",
}
# Where routing values met an operator that is not known, by what they are.
_OF_ROUTING: dict[type, str] = {
    values.Permutation: "from the permutation take tokens as perm // K, weights as w.view(-1)[perm], and the "
    "way back as perm.argsort()",
    values.Mask: "take a mask's rows by x[mask] or where(mask)",
    values.Outside: "take the rows of the pairs that chose the expert: by ids == e, not by ids != e",
    values.Counts: "cumulate the counts into offsets, or cut the sorted rows by them on the host",
    values.Column: "let the column of an expert's weights meet the expert's rows in one product",
    values.SlotOf: "index what has a row for each token by the tokens, and weights by tokens and slots",
    values.TokenOf: "index tokens and weights by the whole list of an expert's tokens",
    values.OneHot: "take an expert's mask from the one-hot, weigh it and sum it over the slots, or count "
    "places in it by one cumsum over all pairs",
}


def remedy_of(lift: Lift, lost: Lost, code: str) -> str:
    """One sentence: what to write instead. `code` is that of the refusal."""
    operator = operator_name(lost.node)
    found = lost.last[1] if lost.last is not None else None
    if code == "R410":
        return _OF_ROUTING.get(type(found), REMEDIES[code])
    if code == "R301" and not lost.because and isinstance(found, Rows):
        return _of_rows(lift, lost.node, operator, found)
    if isinstance(found, Rows) and isinstance(found.domain, OneExpert) and code in _OF_LOOPS:
        return _OF_LOOPS[code]
    return _OF_OPERATOR.get((code, operator), REMEDIES[code])


def _of_rows(lift: Lift, node: Node, operator: str, rows: Rows) -> str:
    domain = rows.domain
    if isinstance(domain, Pairs) and domain.order is not None and _meets_pairs(lift, node, domain):
        return (
            "bring what is in the pairs' own order into that of the sorted rows: index it with the "
            "permutation that sorted them"
        )
    if _differ(lift, node, rows):
        return "let rows meet only rows of the same pairs in the same order: one selection of ids and tokens"
    if operator in _PRODUCTS:
        return "multiply each row by the tensor of its own expert: W[ids] for pairs, grouped for sorted rows"
    if operator in _ADDS_ROWS:
        return "add the rows onto zeros, each at its own token; add what else there is afterwards"
    if operator == "aten::sum":
        return _SUMS[type(domain)] if type(domain) in _SUMS else REMEDIES["R301"]
    if operator in _MOVES_ROWS:
        return "leave the rows in their order and whole: reshape, slice or transpose within a row only"
    if _goes_across(node, rows):
        return (
            "keep the rows apart: the operator goes along a dimension that numbers them, not along the width"
        )
    return REMEDIES["R301"]


_SUMS: dict[type, str] = {
    Pairs: "sum over the slots: rows in the pairs' own order as (T, K, D), summed over K",
    Everywhere: "sum over the experts, weighed by a matrix that is 0 away from the ids",
    OneExpert: "add an expert's rows to their own tokens: out.index_add_(0, tokens, rows)",
}


def _differ(lift: Lift, node: Node, rows: Rows) -> bool:
    """Whether rows of other pairs, or in another order, meet these."""
    others = [found for a in node.all_input_nodes if (found := lift.rows(a)) is not None]
    return any(rows.domain.meet(other.domain) is None for other in others)


def _goes_across(node: Node, rows: Rows) -> bool:
    """Whether an operator along dimensions goes along one that numbers the rows."""
    dims = argument(node, "dim") if hasattr(node.target, "_schema") else None
    rank = rows.lead + len(rows.trail)
    along = dims if isinstance(dims, (list, tuple)) else [dims]
    return any(isinstance(dim, int) and dim % rank < rows.lead for dim in along)


def _meets_pairs(lift: Lift, node: Node, domain: Pairs) -> bool:
    """Whether the operator has an argument with a number a pair, in the pairs' own order."""
    own = Pairs(domain.ids, domain.slots)
    others = [a for a in node.all_input_nodes if is_tensor(a) and lift.of(a) is None]
    return any(is_pair_shaped(a, own) for a in others if lift.graph.parameter(a) is None)
