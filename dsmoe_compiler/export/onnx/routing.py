"""What is known of a layer's routing from the graph that computes it: no pair dropped, ids distinct, weights
not negative.

A look back from ids and weights through operators that keep each fact; anything else ends it, and the fact is
then not taken for granted.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import CASTS, COPIES, VIEWS, shape

aten = torch.ops.aten
_TOPK = frozenset({aten.topk.default})
_ARGMAX = frozenset({aten.argmax.default})
_RESHAPES = VIEWS | {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}
_SEEN_THROUGH = _RESHAPES | CASTS | COPIES
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
# Never negative, whatever they read.
_NEVER_NEGATIVE = frozenset(
    {
        *(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.sigmoid.default),
        *(aten.exp.default, aten.relu.default, aten.abs.default, aten.sqrt.default),
        *(aten.ones_like.default, aten.zeros_like.default, aten.one_hot.default),
        *(getattr(getattr(aten, op), kind) for op in _COMPARISONS for kind in ("Tensor", "Scalar")),
    }
)
# Not negative where no tensor that they read is, and no number.
_KEEPING = frozenset(
    {
        *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor),
        *(aten.add.Scalar, aten.sum.default, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default),
        *(aten.maximum.default, aten.minimum.default, aten.reciprocal.default, aten.rsqrt.default),
    }
)
# Of their first tensor's numbers, some.
_CHOOSING = frozenset(
    {
        *(aten.gather.default, aten.index.Tensor, aten.index_select.default, aten.slice.Tensor),
        *(aten.select.int, aten.expand.default, aten.transpose.int, aten.permute.default, aten.t.default),
    }
)


@dataclass(frozen=True)
class Routing:
    """`drops`: an id may be −1. `distinct`: a token's ids differ. `negative`: a weight may be below 0."""

    drops: bool
    distinct: bool
    negative: bool


def routing_of(ids_TK: Node, weights_TK: Node) -> Routing:
    """What the graph shows of a layer's ids and weights, both (T, K)."""
    chosen = _chosen(ids_TK)
    one_slot = shape(ids_TK)[1] == 1
    return Routing(drops=not chosen, distinct=chosen or one_slot, negative=not _not_negative(weights_TK, {}))


def _chosen(ids_TK: Node) -> bool:
    """Whether these are what a top-k of as many slots chose, so that they are experts, and differ."""
    slots, node = shape(ids_TK)[1], ids_TK
    while node.op == "call_function" and node.target in _SEEN_THROUGH:
        if node.meta["val"].dtype not in (torch.int32, torch.int64):
            return False  # in fewer bits different ids may be one
        node = node.args[0]  # type: ignore[assignment]
    if node.target in _ARGMAX:
        return slots == 1
    if node.target is not operator.getitem or node.args[1] != 1:
        return False
    top = node.args[0]
    assert isinstance(top, Node)
    if top.target not in _TOPK or shape(node)[-1] != slots:
        return False
    (scores, _), dim = top.args[:2], top.args[2] if len(top.args) > 2 else top.kwargs.get("dim", -1)
    assert isinstance(scores, Node)
    return dim in (-1, len(shape(scores)) - 1)


def _not_negative(value: object, known: dict[Node, bool]) -> bool:
    """Whether no number of the value is below 0. `known` are the nodes seen: many are read more than once."""
    if isinstance(value, (int, float)):
        return bool(value >= 0)
    if not isinstance(value, Node) or value.op != "call_function":
        return False
    if value not in known:
        known[value] = _gives_none_negative(value, known)
    return known[value]


def _gives_none_negative(node: Node, known: dict[Node, bool]) -> bool:
    target, args = node.target, node.args
    if target in _NEVER_NEGATIVE:
        return True
    if target is aten.softplus.default:
        return len(args) == 1  # another beta or threshold may be negative
    if target is operator.getitem:
        source, which = args
        assert isinstance(source, Node)
        return bool(which == 0) and source.target in _TOPK and _not_negative(source.args[0], known)
    if target in CASTS and not node.meta["val"].dtype.is_floating_point:
        return False  # whole numbers that are too large become negative ones
    if target in _SEEN_THROUGH or target in _CHOOSING:
        return _not_negative(args[0], known)
    if target in _KEEPING:
        operands = [a for a in args if isinstance(a, Node)]
        numbers = args[1:] if len(operands) == 1 and target not in _REDUCTIONS else ()
        scale = node.kwargs.get("alpha", 1)  # of what is added
        return all(_not_negative(a, known) for a in (*operands, *numbers, scale))
    if target in (aten.clamp.default, aten.clamp_min.default):
        least, most = (*args[1:], None, None)[:2]
        least, most = node.kwargs.get("min", least), node.kwargs.get("max", most)
        return isinstance(least, (int, float)) and least >= 0 and (most is None or _not_negative(most, known))
    if target is aten.where.self:
        return all(_not_negative(a, known) for a in args[1:])
    if target is aten.masked_fill.Scalar:
        return all(_not_negative(a, known) for a in (args[0], args[2]))
    return False


_REDUCTIONS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default})
