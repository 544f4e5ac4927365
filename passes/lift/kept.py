"""Rules of masks that keep some of the chosen pairs: those that find room, tokens that are no padding.

hot * mask                the one-hot of where(kept, ids, -1)
(hot * mask).sum(-1)      1 for the pairs that are kept
w * kept                  weights, 0 for the pairs that are not kept

The ids with −1 where the pair is dropped become a value of the graph, so that every other rule reads them as
it reads any ids. The masks themselves stay what the model computes: nothing needs to be known of them but
that they hold 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.fx import Node
from torch.fx.node import Argument

from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    Size,
    ancestors,
    aten,
    dtype,
    is_tensor,
    same_shape,
    shape,
    value,
)
from dsmoe_compiler.passes.lift.axes import order_of, pair_axes
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Filled,
    Flags,
    Kept,
    KeptWeights,
    Limit,
    Mask,
    OneHot,
    Outside,
    Value,
    Within,
)

_REARRANGE = frozenset(
    f"aten::{name}"
    for name in (
        *("unsqueeze", "squeeze", "expand", "expand_as", "transpose", "permute", "t", "repeat", "select"),
    )
)
_AND = ("aten::mul", "aten::logical_and", "aten::bitwise_and")


def chain(lift: Lift, ids: Node) -> Iterator[Node]:
    """The ids, what they were made of by dropping pairs, and so on."""
    yield ids
    while ids in lift.kept:
        ids = lift.kept[ids].parent
        yield ids


def origin(lift: Lift, ids: Node) -> Node:
    """The ids before any pair was dropped."""
    *_, first = chain(lift, ids)
    return first


def descends(lift: Lift, ids: Node, parent: Node) -> bool:
    """Whether `ids` are `parent`, some pairs dropped or none."""
    return parent in chain(lift, ids)


def limits_of(lift: Lift, ids: Node) -> frozenset[Limit]:
    """What is known of the places of all pairs that are left."""
    steps = (lift.kept[at].limit for at in chain(lift, ids) if at in lift.kept)
    return frozenset(limit for limit in steps if limit is not None)


def keeps(lift: Lift, node: object) -> bool:
    """Whether a value holds nothing but 0 and 1."""
    while isinstance(node, Node) and is_tensor(node):
        found = lift.of(node)
        hot = isinstance(found, OneHot) and found.weight is None
        if hot or isinstance(found, (Within, Flags, Mask, Outside)) or value(node).dtype is torch.bool:
            return True
        name = operator_name(node) if node.op == "call_function" else ""
        if name in _AND:
            return all(keeps(lift, a) for a in node.args[:2])
        if node.target not in CASTS | COPIES | VIEWS and name not in _REARRANGE:
            return False
        node = node.args[0]
    return False


def dropped(
    lift: Lift, ids: Node, node: Node, axes: str, mask: Node, limit: Limit | None = None
) -> Node | None:
    """The ids, −1 for the pairs of which `node` holds nothing but 0 along E and C; None if it has other rows.

    `mask` is what decides it, a limit if it is one for these ids; one mask gives one value, however often it
    is applied.
    """
    key = (ids, limit or _bare(mask, axes))
    if key not in lift.restricted:
        kept = _pairs(lift, node, axes, ids)
        if kept is None:
            return None
        sources = (ids,) if origin(lift, ids) in ancestors([mask]) else (ids, mask)
        made = lift.make(aten.where.ScalarOther, (kept, ids, -1), value(ids), sources)
        lift.kept[made] = Kept(ids, limit)
        lift.restricted[key] = made
    return lift.restricted[key]


def _bare(mask: Node, axes: str) -> tuple[Node, str]:
    """A mask without casts and dimensions of size 1, and the names of its dimensions among `axes`."""
    names = axes[len(axes) - len(shape(mask)) :]
    while operator_name(mask) == "aten::unsqueeze" or mask.target in CASTS | COPIES:
        if operator_name(mask) == "aten::unsqueeze":
            at = argument(mask, "dim") % len(names)
            names = names[:at] + names[at + 1 :]
        below = mask.args[0]
        assert isinstance(below, Node)
        mask = below
    return mask, names


def _pairs(lift: Lift, node: Node, axes: str, ids: Node) -> Node | None:
    """A truth a pair, of the ids' shape: whether `node` holds anything but 0 for it along E and C."""
    left, at = axes, node
    for letter in "EC":
        if letter in left:
            dim = left.index(letter)
            left = left.replace(letter, "")
            at = _truth(lift, at, aten.any.dim, (at, dim), (*shape(at)[:dim], *shape(at)[dim + 1 :]))
    if value(at).dtype is not torch.bool:
        at = _truth(lift, at, aten.ne.Scalar, (at, 0), shape(at))
    if left == "Q":
        slots = shape(ids)[-1]
        at = _truth(lift, at, aten.reshape.default, (at, [slots, -1]), (slots, *shape(ids)[:-1]))
        left = "KT"
    if left == "KT":
        at = _truth(lift, at, aten.transpose.int, (at, 0, 1), (shape(at)[1], shape(at)[0]))
        left = "TK"
    if left == pair_axes(ids):
        return at
    if order_of(left, ids) not in ("TK", "P", order_of(pair_axes(ids), ids)):
        return None
    return _truth(lift, at, aten.reshape_as.default, (at, ids), shape(ids))


def _truth(
    lift: Lift, after: Node, op: torch._ops.OpOverload, args: tuple[Argument, ...], sizes: tuple[Size, ...]
) -> Node:
    return lift.make(op, args, value(after).new_empty(sizes, dtype=torch.bool), (after,))


def keep(lift: Lift, node: Node) -> Value | None:
    """hot * mask, hot & mask."""
    for hot_at, mask_at in ((0, 1), (1, 0)):
        hot, mask = lift.of(node.args[hot_at]), node.args[mask_at]
        if not isinstance(hot, OneHot) or hot.weight is not None or hot.hidden is not None:
            continue
        source = node.args[hot_at]
        assert isinstance(source, Node)
        if not keeps(lift, mask) or not same_shape(node, source):
            continue
        assert isinstance(mask, Node)
        found = lift.of(mask)
        known = isinstance(found, (Flags, Within)) and aligned(found.axes, hot.axes)
        if isinstance(found, Flags) and known and descends(lift, found.ids, hot.ids):
            return replace(hot, ids=found.ids)
        of_these = isinstance(found, Within) and known and descends(lift, hot.ids, found.of)
        limit = found.limit if isinstance(found, Within) and of_these else None
        ids = dropped(lift, hot.ids, node, hot.axes, mask, limit)
        return None if ids is None else replace(hot, ids=ids)
    return None


def aligned(small: str, large: str) -> bool:
    """Whether a value of dimensions `small` broadcasts over `large` along dimensions of its own names."""
    padded = small.rjust(len(large), "1")
    return len(small) <= len(large) and all(a in ("1", b) for a, b in zip(padded, large, strict=True))


def flags(lift: Lift, node: Node) -> Value | None:
    """(hot * mask).sum over the experts: 1 for the pairs that are kept."""
    hot = lift.of(node.args[0])
    if not isinstance(hot, OneHot) or hot.weight is not None or hot.place is not None or "E" not in hot.axes:
        return None
    dims = argument(node, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    rank = len(hot.axes)
    if [d % rank for d in dims if isinstance(d, int)] != [hot.axes.index("E")]:
        return None
    return Flags(hot.ids, hot.axes.replace("E", "1" if argument(node, "keepdim") else ""))


def keep_weights(lift: Lift, node: Node) -> Value | None:
    """w * kept, one number a pair each."""
    for weight_at, mask_at in ((0, 1), (1, 0)):
        weight, mask = node.args[weight_at], node.args[mask_at]
        found = lift.of(mask)
        if not isinstance(found, (Flags, Within)) or not is_tensor(weight) or "E" in found.axes:
            continue
        assert isinstance(weight, Node) and isinstance(mask, Node)
        if not value(weight).is_floating_point() or not lift.opaque(weight):
            continue
        if not same_shape(node, weight) or not same_shape(node, mask):
            continue
        return _kept_weights(lift, weight, mask, found)
    return None


def pair_number(node: Node, axes: str) -> Node | None:
    """The number a pair under the dimensions of size 1 that put it on `axes`."""
    while axes.endswith("1") and operator_name(node) == "aten::unsqueeze":
        below = node.args[0]
        if argument(node, "dim") not in (-1, len(axes) - 1) or not isinstance(below, Node):
            return None
        node, axes = below, axes[:-1]
    return node if len(shape(node)) == len(axes) else None


def select_weights(lift: Lift, node: Node) -> Value | None:
    """where(kept, w, 0)."""
    if len(node.args) != 3:
        return None
    mask, weight, other = node.args
    found, zero = lift.of(mask), lift.of(other)
    if other != 0 and not (isinstance(zero, Filled) and zero.number == 0):
        return None
    if not isinstance(found, (Flags, Within)) or "E" in found.axes or not is_tensor(weight):
        return None
    assert isinstance(weight, Node) and isinstance(mask, Node)
    if not value(weight).is_floating_point() or not lift.opaque(weight) or not same_shape(weight, mask):
        return None
    return _kept_weights(lift, weight, mask, found) if same_shape(node, weight) else None


def _kept_weights(lift: Lift, weight: Node, mask: Node, found: Flags | Within) -> Value | None:
    before, number = lift.of(weight), pair_number(weight, found.axes)
    if isinstance(found, Flags):
        ids: Node | None = found.ids
    elif found.of in lift.kept:
        # Of the pairs that were dropped before, the place is any number: only the mask itself says.
        ids = dropped(lift, origin(lift, found.of), mask, found.axes, mask)
    else:
        ids = dropped(lift, found.of, mask, found.axes, mask, found.limit)
    if isinstance(before, KeptWeights) and ids is not None:
        number = before.weight if before.axes == found.axes else None
        ids = deeper(lift, [ids, before.ids])
    own = ids is not None and found.axes.replace("1", "") == pair_axes(ids)
    return KeptWeights(ids, number, found.axes) if own and ids is not None and number is not None else None


def deeper(lift: Lift, several: Sequence[Node]) -> Node | None:
    """Of ids each made of another by dropping pairs, those with the fewest left; else None."""
    fewest = max(several, key=lambda ids: len(list(chain(lift, ids))))
    return fewest if all(descends(lift, fewest, ids) for ids in several) else None


def cast_weights(lift: Lift, node: Node) -> Value | None:
    """Such weights in another floating type."""
    found = lift.of(node.args[0])
    if not isinstance(found, KeptWeights) or not value(node).is_floating_point():
        return None
    cast = value(found.weight).to(dtype(node))
    weight = lift.make(aten.to.dtype, (found.weight, dtype(node)), cast, (found.weight,))
    return replace(found, weight=weight)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::mul": (keep, keep_weights),
    "aten::logical_and": (keep,),
    "aten::bitwise_and": (keep,),
    "aten::where": (select_weights,),
    "aten::sum": (flags,),
    "aten::any": (flags,),
    "aten::amax": (flags,),
    "aten::to": (cast_weights,),
    "aten::_to_copy": (cast_weights,),
}
