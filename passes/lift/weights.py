"""Rules of one expert's weights: numbers a token, which are its weight for the expert.

(w * (ids == e)).sum(-1)        pair(w), 0 where the token did not choose the expert
where(ids == e, w, 0).sum(-1)   the same
dense weights (T, E)[:, e]      the same
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import dtype, is_tensor, same_size, same_sizes, shape, value
from dsmoe_compiler.passes.lift.axes import count_tokens
from dsmoe_compiler.passes.lift.combine import vanishes
from dsmoe_compiler.passes.lift.dense import as_dense
from dsmoe_compiler.passes.lift.discover import require_distinct
from dsmoe_compiler.passes.lift.masks import listed, listing
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, argument, static
from dsmoe_compiler.passes.lift.values import (
    Column,
    Everywhere,
    Filled,
    Mask,
    MaskedWeights,
    OneExpert,
    Outside,
    Parts,
    Value,
)


def mask_weights(lift: Lift, node: Node) -> Value | None:
    """w * (ids == e)."""
    for mask_at, weight_at in ((0, 1), (1, 0)):
        found = lift.of(node.args[mask_at])
        if isinstance(found, Mask) and same_sizes(shape(node.args[mask_at]), shape(node)):  # type: ignore[arg-type]
            return _masked(lift, node, found, node.args[weight_at])
    return None


def select_weights(lift: Lift, node: Node) -> Value | None:
    """where(ids == e, w, 0)."""
    if len(node.args) != 3:
        return None
    mask, weight, other = lift.of(node.args[0]), node.args[1], node.args[2]
    zero = other == 0 or (isinstance(found := lift.of(other), Filled) and found.number == 0)
    if not isinstance(mask, Mask) or not zero or not same_sizes(shape(node.args[0]), shape(node)):  # type: ignore[arg-type]
        return None
    return _masked(lift, node, mask, weight)


def fill_weights(lift: Lift, node: Node) -> Value | None:
    """w.masked_fill(ids != e, 0)."""
    found, number = lift.of(argument(node, "mask")), argument(node, "value")
    mask = argument(node, "mask")
    if not isinstance(found, Outside) or number != 0 or not same_sizes(shape(mask), shape(node)):
        return None
    return _masked(lift, node, found.mask, node.args[0])


def _masked(lift: Lift, node: Node, mask: Mask, weight: object) -> MaskedWeights | Column | None:
    """The weights of all pairs, 0 for those that did not choose the expert; of one id a token, of tokens."""
    if not isinstance(weight, Node) or not is_tensor(weight) or not value(weight).is_floating_point():
        return None
    sizes = shape(node)
    if len(sizes) != len(mask.axes) or not lift.opaque(weight) or dtype(node) != dtype(weight):
        return None
    if not same_sizes(shape(weight), sizes) or (domain := listed(mask)) is None:
        return None
    match listing(mask):
        case "TK" if mask.axes[-1] == "K":
            return MaskedWeights(domain, lift.pair(PairSource(weight)))
        case "T" if mask.slots == 1 and mask.slot is None:
            tokens = len(mask.axes.rstrip("1"))
            return Column(domain, lift.pair(PairSource(weight)), static(sizes[tokens:]), zero=True)
    return None


def sum_weights(lift: Lift, node: Node) -> Value | None:
    """The sum of masked weights over the slots: the token's weight for the expert."""
    found, source = lift.of(node.args[0]), node.args[0]
    if not isinstance(found, MaskedWeights) or argument(node, "dtype") is not None:
        return None
    assert isinstance(source, Node)
    rank, dims = len(shape(source)), argument(node, "dim")
    if [d % rank for d in dims or []] != [rank - 1]:
        return None
    require_distinct(found.domain.ids)
    return Column(found.domain, found.term, (1,) if argument(node, "keepdim") else (), zero=True)


def select_column(lift: Lift, node: Node) -> Value | None:
    """dense weights (T, E)[:, e]."""
    index: int = argument(node, "index")
    return _column(lift, node, index, ())


def slice_column(lift: Lift, node: Node) -> Value | None:
    """dense weights (T, E)[:, e : e + 1]."""
    start, stop = argument(node, "start") or 0, argument(node, "end")
    if not isinstance(start, int) or stop != start + 1 or argument(node, "step") != 1:
        return None
    rank = len(shape(node))
    return _column(lift, node, start, (1,)) if argument(node, "dim") % rank == rank - 1 else None


def columns(lift: Lift, node: Node) -> Value | None:
    """dense weights (T, E).unbind(-1)."""
    rows = as_dense(lift, node.args[0])
    if rows is None or not isinstance(rows.domain, Everywhere):
        return None
    found = tuple(_column(lift, node, e, ()) for e in range(rows.domain.experts))
    return Parts(found) if all(found) else None


def _column(lift: Lift, node: Node, index: int, kept: tuple[int, ...]) -> Column | None:
    rows = as_dense(lift, node.args[0])
    if rows is None or not isinstance(rows.domain, Everywhere) or any(size != 1 for size in rows.trail):
        return None
    leaves = lift.terms.leaves(rows.term, "pair")
    ids = {lift.sources[str(leaf.attrs[0])].ids for leaf in leaves}
    at = argument(node, "dim") % (rows.lead + len(rows.trail))
    if at != rows.domain.axis or (kept and rows.trail) or len(ids) != 1 or (only := ids.pop()) is None:
        return None
    root = lift.ids_root(only)
    if root is None:
        return None
    domain = OneExpert(*root, index % rows.domain.experts, "token")
    return Column(domain, rows.term, rows.trail + kept, zero=vanishes(lift, rows.term))


def reshape_column(lift: Lift, node: Node) -> Value | None:
    """Dimensions of size 1 beside a column's numbers; its tokens in one dimension."""
    found, source = lift.of(node.args[0]), node.args[0]
    if not isinstance(found, Column):
        return None
    assert isinstance(source, Node)
    old, new = shape(source), shape(node)
    lead = old[: len(old) - len(found.trail)]
    for tokens in (lead, (count_tokens(found.domain.ids),)):
        if same_sizes(new[: len(tokens)], tokens) and all(same_size(s, 1) for s in new[len(tokens) :]):
            return replace(found, trail=static(new[len(tokens) :]))
    return None


def cast_weights(lift: Lift, node: Node) -> Value | None:
    """A column or masked weights in another floating dtype."""
    found = lift.of(node.args[0])
    if not isinstance(found, (Column, MaskedWeights)) or not value(node).is_floating_point():
        return None
    term = lift.terms.number("cast", (found.term,), (str(dtype(node)).removeprefix("torch."),))
    return replace(found, term=term)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::mul": (mask_weights,),
    "aten::where": (select_weights,),
    "aten::masked_fill": (fill_weights,),
    "aten::sum": (sum_weights,),
    "aten::select": (select_column,),
    "aten::slice": (slice_column,),
    "aten::unbind": (columns,),
    "aten::to": (cast_weights,),
    "aten::_to_copy": (cast_weights,),
    "aten::type_as": (cast_weights,),
    "aten::unsqueeze": (reshape_column,),
    "aten::squeeze": (reshape_column,),
    "aten::view": (reshape_column,),
    "aten::reshape": (reshape_column,),
}
