"""Rules of who sits where in the experts' capacity: one-hots of experts times one-hots of places.

    dispatch (T, E, C) = Σ_k hot(expert) · hot(place)             1 where a pair sits
    combine  (T, E, C) = Σ_k weight · hot(expert) · hot(place)    its weight

by einsum, by broadcasting or by a batched product; of each slot's pairs alone, then added. What is not 0 in
the combine is the dispatch, but for pairs of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import VIEWS, aten, dtype, is_tensor, same_shape, same_size, shape, value
from dsmoe_compiler.passes.lift.axes import pair_axes, token_axes
from dsmoe_compiler.passes.lift.kept import deeper, dropped
from dsmoe_compiler.passes.lift.queue import at_most, largest_places, renamed
from dsmoe_compiler.passes.lift.signs import never_below_zero
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Dispatch,
    Filled,
    Flags,
    KeptWeights,
    OneHot,
    PlaceHot,
    Value,
    Within,
)


def einsum(lift: Lift, node: Node) -> Value | None:
    """einsum("tke,tkc->tec", hot, place hot), with the pairs' weights or without."""
    parsed = equation(node)
    return None if parsed is None else _product(lift, node, argument(node, "tensors"), *parsed)


def equation(node: Node) -> tuple[list[str], str] | None:
    """The names of an einsum's operands and of its result; None where one has a dimension twice."""
    inputs, arrow, out = str(argument(node, "equation")).replace(" ", "").partition("->")
    names = inputs.split(",")
    once = all(len(set(n)) == len(n) for n in (*names, out))
    return (names, out) if arrow and once else None


def multiply(lift: Lift, node: Node) -> Value | None:
    """hot (T, K, E, 1) * place hot (T, K, 1, C), and the like, with or without the pairs' weights."""
    hot = next((f for a in node.args[:2] if isinstance(f := lift.of(a), (OneHot, PlaceHot))), None)
    if hot is None:
        return None
    ids = hot.ids if isinstance(hot, OneHot) else hot.place.of
    letters = [_letters_of(lift, a, ids, broadcasts=True) for a in node.args[:2]]
    if None in letters:
        return None
    rank = len(shape(node))
    padded = [str(axes).rjust(rank, "1") for axes in letters]
    if any(len(axes) != rank for axes in padded):
        return None
    out = "".join(a if b == "1" else b for a, b in zip(*padded, strict=True))
    if any(a not in ("1", b) for axes in padded for a, b in zip(axes, out, strict=True)):
        return None
    return _of_factors(lift, node, list(node.args[:2]), out)


def contract(lift: Lift, node: Node) -> Value | None:
    """hot (T, E, K) @ place hot (T, K, C)."""
    left, right = (lift.of(a) for a in node.args[:2])
    if not isinstance(left, (OneHot, PlaceHot)) or not isinstance(right, (OneHot, PlaceHot)):
        return None
    a, b = left.axes, right.axes
    inner = len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1] == "K"
    return _of_factors(lift, node, list(node.args[:2]), a[:2] + b[2]) if inner else None


def _product(
    lift: Lift, node: Node, operands: Sequence[Node], names: Sequence[str], out: str
) -> Value | None:
    """One-hots and weights multiplied, summed over the slots perhaps."""
    hot = next((f for o in operands if isinstance(f := lift.of(o), OneHot)), None)
    if hot is None:
        return None
    known: dict[str, str] = {}
    for operand, name in zip(operands, names, strict=True):
        axes = _letters_of(lift, operand, hot.ids)
        if axes is None or len(axes) != len(name):
            return None
        for letter, axis in zip(name, axes, strict=True):
            if axis == "1" or known.setdefault(letter, axis) != axis:
                return None
    if len(set(known.values())) != len(known) or any(letter not in known for letter in out):
        return None
    if {known[a] for a in set(known) - set(out)} - {"K"}:
        return None
    return _of_factors(lift, node, operands, "".join(known[a] for a in out))


def _letters_of(lift: Lift, node: object, ids: Node, broadcasts: bool = False) -> str | None:
    """The names of a factor's dimensions, which are those of `ids` where nothing else is known of it."""
    found = lift.of(node)
    if isinstance(found, (OneHot, PlaceHot, Flags, Within, KeptWeights)):
        return found.axes
    if not isinstance(node, Node) or not is_tensor(node) or not value(node).is_floating_point():
        return None
    added = 0
    while operator_name(node) == "aten::unsqueeze" and argument(node, "dim") in (-1, len(shape(node)) - 1):
        below = node.args[0]
        assert isinstance(below, Node)
        node, added = below, added + 1
    rank, names = len(shape(node)), pair_axes(ids)
    if rank == len(names) + 1 and same_size(shape(node)[-1], 1) and broadcasts:
        names += "1"
    return names + "1" * added if rank == len(names) and lift.opaque(node) else None


def weigh_by_scores(lift: Lift, node: Node) -> Value | None:
    """scores (T, E) * hot: each pair's weight is its token's score of its expert."""
    for hot_at, scores_at in ((0, 1), (1, 0)):
        hot, scores = lift.of(node.args[hot_at]), node.args[scores_at]
        source = node.args[hot_at]
        if not isinstance(hot, OneHot) or hot.weight is not None or hot.place is not None:
            continue
        if not isinstance(scores, Node) or not isinstance(source, Node) or not same_shape(node, source):
            continue
        matrix = _scores(lift, scores, hot)
        if matrix is not None and dtype(matrix) == dtype(node):
            return replace(hot, weight=_at_ids(lift, matrix, hot.ids))
    return None


def _scores(lift: Lift, node: Node, hot: OneHot) -> Node | None:
    """The (T, E) scores under dimensions of size 1 that put them beside a one-hot of (T, K) or (T,) ids."""
    if not is_tensor(node) or not value(node).is_floating_point() or lift.expert_parameter(node) is not None:
        return None
    sizes = shape(node)
    beside = dict(zip(hot.axes, sizes, strict=True)) if len(sizes) == len(hot.axes) else {}
    if hot.axes not in ("TE", "TKE", "KTE") or ("K" in beside and not same_size(beside["K"], 1)):
        return None
    below, matrix = node, (shape(hot.ids)[0], hot.experts)
    while len(shape(below)) == 3:
        under = below.args[0] if below.op == "call_function" else None
        views = below.target in VIEWS or operator_name(below) == "aten::unsqueeze"
        if not views or not isinstance(under, Node) or not is_tensor(under):
            return None
        below = under
    if len(shape(below)) != 2 or not all(map(same_size, shape(below), matrix)):
        return None
    lift.require_unwritten(below)
    return (
        below if beside and same_size(beside["T"], matrix[0]) and same_size(beside["E"], matrix[1]) else None
    )


def _at_ids(lift: Lift, scores: Node, ids: Node) -> Node:
    """scores.gather(1, ids), any score for the pairs that are dropped."""
    kept = lift.make(aten.clamp.default, (ids, 0), value(ids), (ids,))
    if len(shape(ids)) == 2:
        like = value(ids).to(dtype(scores))
        return lift.make(aten.gather.default, (scores, 1, kept), like, (scores,))
    column = lift.make(aten.unsqueeze.default, (kept, 1), value(ids).unsqueeze(1), (ids,))
    like = value(ids).to(dtype(scores)).unsqueeze(1)
    picked = lift.make(aten.gather.default, (scores, 1, column), like, (scores,))
    return lift.make(aten.squeeze.dim, (picked, 1), value(ids).to(dtype(scores)), (scores,))


def _of_factors(lift: Lift, node: Node, factors: Sequence[object], axes: str) -> Value | None:
    """The product of one-hots of experts and places, masks and weights, all of them of the same pairs."""
    found = [lift.of(f) for f in factors]
    hots = [f for f in found if isinstance(f, OneHot)]
    seated = [f for f in found if isinstance(f, PlaceHot)]
    places = [h.place for h in hots if h.place is not None] + [f.place for f in seated]
    if not hots or any(h.hidden for h in hots) or len(places) > 1 or "E" not in axes:
        return None
    if ("C" in axes) != bool(places) or any(isinstance(f, Within) for f in found):
        return None
    if not places and set(hots[0].axes) - set(axes) - {"1"}:
        return None  # only places tell the pairs of slots that are summed apart
    of = [f.ids for f in found if isinstance(f, (OneHot, Flags, KeptWeights))]
    ids = deeper(lift, of)
    if ids is None:
        return None
    if seated:
        kept = _seated(lift, ids, seated[0])
        if kept is None:
            return None
        ids = kept
    weights = [_weight(f, v) for f, v in zip(factors, found, strict=True)]
    weight = _times(lift, node, [w for w in weights if w is not None], ids)
    if weight is None and any(weights):
        return None
    return OneHot(ids, hots[0].experts, weight, axes, places[0] if places else None)


def _weight(factor: object, found: Value | None) -> Node | None:
    """The number a pair, if a factor has one."""
    if isinstance(found, (OneHot, KeptWeights)):
        return found.weight
    if isinstance(found, (PlaceHot, Flags)) or not isinstance(factor, Node):
        return None
    while operator_name(factor) == "aten::unsqueeze":
        below = factor.args[0]
        assert isinstance(below, Node)
        factor = below
    return factor


def _times(lift: Lift, node: Node, weights: list[Node], ids: Node) -> Node | None:
    """The product of the pairs' weights as a value of the graph; None where they are none a pair."""
    weights = [_without_slot(lift, w, ids) for w in weights]
    if not weights or any(not same_shape(w, ids) or dtype(w) != dtype(node) for w in weights):
        return None
    product, *rest = weights
    for other in rest:
        product = lift.make(aten.mul.Tensor, (product, other), value(product), (product, other))
    return product


def _without_slot(lift: Lift, weight: Node, ids: Node) -> Node:
    """Weights (T, 1) as (T,) where there is one id a token."""
    if len(shape(ids)) != 1 or len(shape(weight)) != 2 or not same_size(shape(weight)[1], 1):
        return weight
    return lift.make(aten.squeeze.dim, (weight, 1), value(weight)[:, 0], (weight,))


def _seated(lift: Lift, ids: Node, hot: PlaceHot) -> Node | None:
    """The ids without the pairs whose place is none of the classes."""
    queue, most = hot.place.queue, hot.place.most
    bounds = [most] if most is not None else largest_places(lift, ids, queue)
    if queue.start >= 0 and any(at_most(bound, hot.classes - 1) for bound in bounds):
        return ids
    return dropped(lift, ids, hot.node, hot.axes, hot.node)


def over_slots(lift: Lift, node: Node) -> Value | None:
    """(T, K, E, C) summed over the slots."""
    hot = lift.of(node.args[0])
    if not isinstance(hot, OneHot) or hot.place is None or hot.hidden or argument(node, "dtype") is not None:
        return None
    dims, keep = argument(node, "dim"), argument(node, "keepdim")
    summed = [hot.axes[d % len(hot.axes)] for d in dims or []]
    return replace(hot, axes=hot.axes.replace("K", "")) if summed == ["K"] and not keep else None


def not_zero(lift: Lift, node: Node) -> Value | None:
    """combine > 0, combine != 0, combine.bool(): the dispatch, but for pairs of weight 0."""
    found = lift.of(node.args[0])
    if isinstance(found, Dispatch):
        parts = [_not_zero(lift, node, part) for part in found.parts]
        return None if None in parts else Dispatch(tuple(p for p in parts if p is not None))
    return _not_zero(lift, node, found) if isinstance(found, OneHot) else None


def _not_zero(lift: Lift, node: Node, hot: OneHot) -> OneHot | None:
    compares = operator_name(node) in ("aten::gt", "aten::ne")
    if hot.place is None or (compares and node.args[1] != 0) or hot.hidden is not None:
        return None
    if not compares and dtype(node) is not torch.bool:
        return None
    signed = hot.weight is not None and not never_below_zero(hot.weight)
    if operator_name(node) == "aten::gt" and signed:
        raise Unproven("R409", "pairs of negative weight are not dispatched, and are combined nevertheless")
    return replace(hot, weight=None, hidden=hot.weight)


def cast(lift: Lift, node: Node) -> Value | None:
    """One-hots with places in another type, their weights in it."""
    found = lift.of(node.args[0])
    parts = found.parts if isinstance(found, Dispatch) else (found,) if isinstance(found, OneHot) else ()
    if not parts or any(p.weight is not None for p in parts):
        return None if not parts or not value(node).is_floating_point() else _cast_weights(lift, node, found)
    return found


def _cast_weights(lift: Lift, node: Node, found: Value | None) -> Value | None:
    if isinstance(found, Dispatch):
        parts = [_cast_weights(lift, node, part) for part in found.parts]
        return Dispatch(tuple(p for p in parts if isinstance(p, OneHot)))
    assert isinstance(found, OneHot)
    if found.weight is None or dtype(found.weight) == dtype(node):
        return found
    weight = lift.make(
        aten.to.dtype, (found.weight, dtype(node)), value(found.weight).to(dtype(node)), (found.weight,)
    )
    return replace(found, weight=weight)


def add(lift: Lift, node: Node) -> Value | None:
    """The one-hots of one slot's pairs plus those of another's."""
    if argument(node, "alpha", 1) != 1:
        return None
    parts = list[OneHot]()
    for operand, other in zip(node.args[:2], reversed(node.args[:2]), strict=True):
        found = lift.of(operand)
        if (
            isinstance(found, Filled)
            and found.number == 0
            and isinstance(other, Node)
            and same_shape(other, node)
        ):
            same = isinstance(rest := lift.of(other), (OneHot, Dispatch)) and dtype(other) == dtype(node)
            return rest if same else None
        own = found.parts if isinstance(found, Dispatch) else (found,)
        seats = [p for p in own if isinstance(p, OneHot) and p.place is not None and not p.hidden]
        if len(seats) < len(own) or not isinstance(operand, Node) or not same_shape(operand, node):
            return None
        parts += seats
    one_each = len({p.ids for p in parts}) == len(parts) >= 2
    return Dispatch(tuple(parts)) if one_each and len({p.axes for p in parts}) == 1 else None


def rename(lift: Lift, node: Node) -> Value | None:
    """The dimensions of a sum of one-hots in another order."""
    found = lift.of(node.args[0])
    if not isinstance(found, Dispatch):
        return None
    axes = renamed(node, found.parts[0].axes)
    return None if axes is None else Dispatch(tuple(replace(p, axes=axes) for p in found.parts))


def seats_of(lift: Lift, node: object, axes: str = "") -> tuple[OneHot, ...]:
    """The one-hots of a (T, E, C) value, in the order of `axes` or in any; () if it is none."""
    found = lift.of(node)
    parts = found.parts if isinstance(found, Dispatch) else (found,) if isinstance(found, OneHot) else ()
    fits = all(p.axes == axes if axes else sorted(p.axes) == sorted(tokens_of(p) + "CE") for p in parts)
    return parts if fits and all(p.place is not None for p in parts) else ()


def tokens_of(hot: OneHot) -> str:
    """The names of the one-hot's token dimensions."""
    return "T" if "T" in hot.axes else token_axes(hot.ids)


def flatten(lift: Lift, node: Node) -> Value | None:
    """(T, E, C) as (T, E·C): the slots of all experts as one dimension."""
    parts = seats_of(lift, node.args[0], "TEC")
    source = node.args[0]
    assert isinstance(source, Node)
    if not parts or len(shape(node)) != 2 or not same_size(shape(node)[0], shape(source)[0]):
        return None
    flat = tuple(replace(p, axes="TX") for p in parts)
    return flat[0] if len(flat) == 1 else Dispatch(flat)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::einsum": (einsum,),
    "aten::mul": (multiply, weigh_by_scores),
    "aten::bmm": (contract,),
    "aten::matmul": (contract,),
    "aten::view": (flatten,),
    "aten::reshape": (flatten,),
    "aten::flatten": (flatten,),
    "aten::sum": (over_slots,),
    "aten::gt": (not_zero,),
    "aten::ne": (not_zero,),
    "aten::to": (not_zero, cast),
    "aten::_to_copy": (not_zero, cast),
    "aten::type_as": (cast,),
    "aten::add": (add,),
    "aten::permute": (rename,),
    "aten::transpose": (rename,),
    "aten::t": (rename,),
    "aten::mT": (rename,),
}
