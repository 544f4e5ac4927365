"""Rules of dense routing weights: a (T, E) matrix with a token's weights at its ids, a number elsewhere.

    zeros.scatter(1, ids, w)                 w at the ids, 0 elsewhere
    (one_hot(ids, E) * w[..., None]).sum(1)  the same
    zeros.scatter(1, ids, 1.0) * scores      scores at the ids, 0 elsewhere
    dense / dense.sum(-1, keepdim=True)      still 0 elsewhere

Read as rows over (token, expert), the matrix is the leaf pair(w): where its number off the ids makes the
whole term vanish, every token for every expert says no more than the selected pairs do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import (
    aten,
    dtype,
    is_tensor,
    same_shape,
    same_size,
    same_sizes,
    shape,
    value,
)
from dsmoe_compiler.passes.lift.axes import order_of, token_sizes
from dsmoe_compiler.passes.lift.discover import require_distinct
from dsmoe_compiler.passes.lift.masks import hot, plain
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import Everywhere, Filled, MultiHot, OneHot, Rows, Value

_COUNTS = (torch.int32, torch.int64)


def scatter(lift: Lift, node: Node) -> Value | None:
    """filled.scatter(1, ids, w): w at the ids."""
    base, ids, written = lift.of(node.args[0]), node.args[2], node.args[3]
    if node.target not in (aten.scatter.src, aten.scatter.value) or not isinstance(base, Filled):
        return None
    rank = len(shape(node))
    if rank < 2 or argument(node, "dim") % rank != rank - 1:
        return None
    experts = shape(node)[-1]
    assert isinstance(ids, Node)
    if not isinstance(experts, int) or lift.of(ids) is not None:
        return None
    if not value(node).is_floating_point():
        return MultiHot(ids, experts) if base.number == 0 and written == 1 else None
    if isinstance(written, Node):
        if not is_tensor(written) or not lift.opaque(written) or not same_shape(written, ids):
            return None
        source = PairSource(written, ids, fill=base.number)
    elif written == 1 and base.number == 0:
        source = PairSource(node, ids, matrix=True, mask=True, fill=0.0)
    else:
        return None
    require_distinct(ids)
    return Rows(Everywhere(experts, rank - 1), lift.pair(source), rank, ())


def mask_as_integers(lift: Lift, node: Node) -> Value | None:
    """zeros.scatter(1, ids, 1.0) as integers, of which experts' pairs are counted."""
    rows = lift.rows(node.args[0])
    if rows is None or not isinstance(rows.domain, Everywhere) or value(node).dtype not in _COUNTS:
        return None
    leaf = lift.terms.steps[rows.term]
    source = lift.sources[str(leaf.attrs[0])] if leaf.op == "pair" else None
    if source is None or not source.mask or source.ids is None or rows.domain.axis != len(shape(node)) - 1:
        return None
    return MultiHot(source.ids, rows.domain.experts)


def one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot(ids, E), of ids (T, K), of the flat pairs, or of one id a token."""
    ids, experts = node.args[0], argument(node, "num_classes")
    assert isinstance(ids, Node)
    return hot(lift, ids, experts) if isinstance(experts, int) and experts > 0 else None


def weigh_one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot (T, K, E) * w (T, K, 1); of one id a token, (T, E) * (T, 1), dense weights."""
    for hot_at, weight_at in ((0, 1), (1, 0)):
        found, weight = plain(lift.of(node.args[hot_at])), node.args[weight_at]
        if found is None or not is_tensor(weight):
            continue
        assert isinstance(weight, Node)
        if not same_sizes(shape(weight), (*shape(node)[:-1], 1)) or not value(weight).is_floating_point():
            continue
        below = weight.args[0] if weight.target is aten.unsqueeze.default else weight
        if not isinstance(below, Node) or not lift.opaque(below) or "1" in found.axes:
            continue
        root = lift.ids_root(found.ids)
        match order_of(found.axes, found.ids):
            case "TKE":
                return replace(found, weight=below)
            case "TE" if root is not None and root[1] == 1:
                return _dense(lift, node, found, below)
    return None


def sum_one_hot(lift: Lift, node: Node) -> Value | None:
    """The sum of a weighted one-hot over the slots; of one that is not, which experts a token chose."""
    found, dims = lift.of(node.args[0]), argument(node, "dim")
    if not isinstance(found, OneHot) or argument(node, "keepdim") or argument(node, "dtype") is not None:
        return None
    if order_of(found.axes, found.ids) != "TKE" or "1" in found.axes:
        return None
    rank = len(found.axes)
    if [d % rank for d in dims or []] != [rank - 2]:
        return None
    if found.weight is not None:
        require_distinct(found.ids)
        return _dense(lift, node, found, found.weight)
    if plain(found) is None or value(node).is_floating_point():
        return None
    require_distinct(found.ids)
    return MultiHot(found.ids, found.experts)


def _dense(lift: Lift, node: Node, hot: OneHot, weight: Node, rank: int | None = None) -> Rows:
    """The pairs' weights at their experts, 0 elsewhere."""
    term = lift.pair(PairSource(weight, hot.ids, fill=0.0))
    if dtype(node) != dtype(weight):
        term = lift.terms.number("cast", (term,), (str(dtype(node)).removeprefix("torch."),))
    rank = rank or len(shape(node))
    return Rows(Everywhere(hot.experts, rank - 1), term, rank, ())


def as_dense(lift: Lift, node: object) -> Rows | None:
    """Dense weights, also as the weighed one-hot of one id a token."""
    found = lift.of(node)
    if not isinstance(found, OneHot) or found.weight is None or not isinstance(node, Node):
        return lift.rows(node)
    names = found.axes.rstrip("1")
    if plain(replace(found, weight=None)) is None or "1" in names or order_of(names, found.ids) != "TE":
        return None
    return replace(_dense(lift, node, found, found.weight, len(names)), trail=(1,) * found.axes.count("1"))


def weigh_rows(lift: Lift, node: Node) -> Value | None:
    """every token's rows for every expert (T, E, D) * weighed one-hot (T, E, 1)."""
    for hot_at, rows_at in ((0, 1), (1, 0)):
        if not isinstance(lift.of(node.args[hot_at]), OneHot):
            continue
        weights, rows = as_dense(lift, node.args[hot_at]), lift.rows(node.args[rows_at])
        if weights is None or rows is None or (weights.domain, weights.lead) != (rows.domain, rows.lead):
            continue
        operands = (node.args[hot_at], node.args[rows_at])
        if weights.trail != (1,) or len(rows.trail) != 1 or not _keep_rows(node, operands, rows.lead):
            continue
        return rows.like(lift.terms.number("mul", (rows.term, weights.term)))
    return None


def _keep_rows(node: Node, operands: Sequence[object], lead: int) -> bool:
    return all(isinstance(o, Node) and same_sizes(shape(o)[:lead], shape(node)[:lead]) for o in operands)


def choose(lift: Lift, node: Node) -> Value | None:
    """scores (T, E) * which experts the token chose (T, E)."""
    for hot_at, other_at in ((0, 1), (1, 0)):
        found, other = lift.of(node.args[hot_at]), node.args[other_at]
        if not isinstance(found, MultiHot) or not is_tensor(other) or not lift.opaque(other):
            continue
        assert isinstance(other, Node)
        if not value(other).is_floating_point() or dtype(other) != dtype(node):
            continue
        rank = len(shape(node))
        if not same_sizes(shape(other), shape(node)) or not same_size(shape(node)[-1], found.experts):
            continue
        if not same_sizes(shape(node)[:-1], token_sizes(found.ids)):
            continue
        require_distinct(found.ids)
        leaf = lift.pair(PairSource(other, found.ids, matrix=True, fill=0.0))
        return Rows(Everywhere(found.experts, rank - 1), leaf, rank, ())
    return None


def scale_matrix(lift: Lift, node: Node) -> Value | None:
    """dense weights (T, E) · (T, 1), / (T, 1) or · (T, E): still 0 off the ids."""
    for dense_at, other_at in ((0, 1), (1, 0)):
        rows, other = lift.rows(node.args[dense_at]), node.args[other_at]
        if rows is None or rows.domain != Everywhere(_experts(rows), rows.lead - 1) or rows.trail:
            continue
        divides = operator_name(node) == "aten::div"
        if divides and (dense_at == 1 or argument(node, "rounding_mode")):
            continue
        source = zero_filled(lift, rows)
        if source is None or not isinstance(other, Node) or not _scales(lift, other, node, divides):
            continue
        if (
            source.mask
            and not divides
            and same_shape(other, node)
            and value(node).dtype == value(other).dtype
        ):
            return rows.like(lift.pair(PairSource(other, source.ids, matrix=True, fill=0.0)))
        made_of = source.made_of or source.node
        return rows.like(lift.pair(PairSource(node, source.ids, matrix=True, fill=0.0, made_of=made_of)))
    return None


def softmax(lift: Lift, node: Node) -> Value | None:
    """softmax of what is -inf off the ids: 0 there."""
    rows = lift.rows(node.args[0])
    if rows is None or rows.domain != Everywhere(_experts(rows), rows.lead - 1) or rows.trail:
        return None
    source = _leaf(lift, rows)
    if source is None or source.fill != -math.inf or argument(node, "dim") not in (-1, rows.lead - 1):
        return None
    return rows.like(lift.pair(PairSource(node, source.ids, matrix=True, fill=0.0, made_of=source.node)))


def _experts(rows: Rows) -> int:
    return rows.domain.experts if isinstance(rows.domain, Everywhere) else 0


def zero_filled(lift: Lift, rows: Rows) -> PairSource | None:
    """The source of weights that are a leaf alone, cast or not, and 0 off the ids."""
    source = _leaf(lift, rows)
    return source if source is not None and source.fill == 0 else None


def _leaf(lift: Lift, rows: Rows) -> PairSource | None:
    """The source of weights that are a leaf alone, cast or not."""
    term = rows.term
    while lift.terms.steps[term].op == "cast":
        term = lift.terms.steps[term].args[0]
    leaf = lift.terms.steps[term]
    return lift.sources[str(leaf.attrs[0])] if leaf.op == "pair" else None


def _scales(lift: Lift, other: Node, node: Node, divides: bool) -> bool:
    """An opaque floating value (T, 1), or (T, E) where it does not divide: 0 / 0 would be NaN off the ids."""
    if not is_tensor(other) or not value(other).is_floating_point():
        return False
    if not same_sizes(shape(other)[:-1], shape(node)[:-1]) or not lift.opaque(other):
        return False
    return same_size(shape(other)[-1], 1) or (not divides and same_shape(other, node))


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::scatter": (scatter,),
    "aten::one_hot": (one_hot,),
    "aten::to": (mask_as_integers,),
    "aten::_to_copy": (mask_as_integers,),
    "aten::mul": (weigh_one_hot, weigh_rows, choose, scale_matrix),
    "aten::div": (scale_matrix,),
    "aten::softmax": (softmax,),
    "aten::_softmax": (softmax,),
    "aten::sum": (sum_one_hot,),
}
