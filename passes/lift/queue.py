"""Rules of queues: each pair's place among those that chose its expert, which decides who finds room.

hot.cumsum(0) - 1                          places, starting at 0, in any order of the pairs
(places * hot).sum(-1), places.gather      each pair's own
places + hot of other slots .sum(0)        after all pairs of those
places < capacity                          a mask of the pairs that find room
one_hot(places, capacity)                  1 at each pair's place

No two pairs have the same place with the same expert, whatever order they were counted in: that is all the
dispatch needs, and what every rule here keeps true.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    Size,
    dtype,
    is_tensor,
    same_shape,
    same_size,
    shape,
    value,
)
from dsmoe_compiler.passes.lift.axes import pair_axes, token_axes
from dsmoe_compiler.passes.lift.kept import descends, dropped, keeps, limits_of
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Flags,
    KeptWeights,
    Limit,
    OneHot,
    OwnPlaces,
    Parts,
    Place,
    PlaceHot,
    Queue,
    Range,
    Totals,
    Value,
    Within,
)

# Places are counted without error in these; half stops at 2048, bfloat16 at 256.
_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)


def count_up(lift: Lift, node: Node) -> Value | None:
    """cumsum of a one-hot along its pairs."""
    hot = lift.of(node.args[0])
    if not _is_plain(hot) or dtype(node) not in _EXACT:
        return None
    assert isinstance(hot, OneHot)
    along = hot.axes[argument(node, "dim") % len(hot.axes)]
    groups = _groups(hot, along)
    return None if groups is None else Queue(hot.ids, node, hot.experts, hot.axes, 1, groups=groups)


def _is_plain(found: Value | None) -> bool:
    """A one-hot of experts alone."""
    return isinstance(found, OneHot) and found.weight is None and found.place is None and "E" in found.axes


def _groups(hot: OneHot, along: str) -> str | None:
    """The dimensions of groups of tokens, "" for one, if a group's pairs all lie along `along`; else None."""
    left = hot.axes.replace("E", "").replace("1", "")
    single = "K" not in pair_axes(hot.ids) or same_size(shape(hot.ids)[-1], 1)
    left = left.replace("K", "") if single else left
    if left in ("P", "Q") or (single and left in ("T", token_axes(hot.ids))):
        return left[:-1] if left[-1] == along else None
    return None


def totals(lift: Lift, node: Node) -> Value | None:
    """hot.sum(0, keepdim=True): how many pairs chose each expert, as a row."""
    hot = lift.of(node.args[0])
    if not _is_plain(hot) or dtype(node) not in _EXACT or not argument(node, "keepdim"):
        return None
    assert isinstance(hot, OneHot)
    counted = "".join(hot.axes[d % len(hot.axes)] for d in argument(node, "dim") or [])
    groups = _groups(hot, counted)
    return None if groups is None or hot.axes != groups + counted + "E" else Totals(hot.ids, groups)


def shift(lift: Lift, node: Node) -> Value | None:
    """Places plus or minus a number, minus the one-hot, plus how many chose the expert in other slots."""
    left, right = node.args[0], node.args[1]
    found, sign = lift.of(left), -1 if operator_name(node) == "aten::sub" else 1
    if not isinstance(found, (Queue, Place)) and sign == 1:
        left, right = right, left
        found = lift.of(left)
    if not isinstance(found, (Queue, Place)) or argument(node, "alpha", 1) != 1 or dtype(node) not in _EXACT:
        return None
    if isinstance(right, int) and not isinstance(right, bool):
        return _moved(found, sign * right)
    other = lift.of(right)
    if not isinstance(found, Queue) or not isinstance(left, Node) or not same_shape(node, left):
        return None
    if isinstance(other, OneHot) and _is_plain(other) and (other.ids, other.axes) == (found.ids, found.axes):
        return _moved(found, sign)
    if not isinstance(other, Totals) or sign != 1 or not found.axes.endswith("E"):
        return None
    if other.groups == found.groups and len(found.axes) == len(other.groups) + 2:
        return replace(found, before=(*found.before, other.ids))
    return None


def _moved(found: Queue | Place, by: int) -> Queue | Place:
    if isinstance(found, Queue):
        return replace(found, start=found.start + by)
    most = None if found.most is None else found.most + by
    return replace(found, queue=replace(found.queue, start=found.queue.start + by), most=most)


def own_places(lift: Lift, node: Node) -> Value | None:
    """places * hot, also once more by the one-hot of the pairs that are kept."""
    for queue_at, hot_at in ((0, 1), (1, 0)):
        places, hot = lift.of(node.args[queue_at]), lift.of(node.args[hot_at])
        if not isinstance(places, (Queue, OwnPlaces)) or not isinstance(hot, OneHot) or not _is_plain(hot):
            continue
        queue, of = (places, places.ids) if isinstance(places, Queue) else (places.queue, places.of)
        if hot.axes == queue.axes and descends(lift, hot.ids, of) and dtype(node) in _EXACT:
            return OwnPlaces(queue, hot.ids)
    return None


def own_place(lift: Lift, node: Node) -> Value | None:
    """The sum, or the largest, of the places at the pairs' own experts."""
    found = lift.of(node.args[0])
    if not isinstance(found, OwnPlaces):
        return None
    dims, axes = argument(node, "dim"), found.queue.axes
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    if [d % len(axes) for d in dims if isinstance(d, int)] != [axes.index("E")]:
        return None
    largest = operator_name(node) in ("aten::amax", "aten::max")
    if largest and found.queue.start < 0:
        return None
    place = Place(found.queue, found.of, axes.replace("E", "1" if argument(node, "keepdim") else ""))
    return Parts((place, None)) if operator_name(node) == "aten::max" else place


def place_at_id(lift: Lift, node: Node) -> Value | None:
    """places.gather(-1, ids.unsqueeze(-1)), places.gather(-1, ids) of one id a token."""
    queue, index = lift.of(node.args[0]), argument(node, "index")
    if not isinstance(queue, Queue) or not queue.axes.endswith("E"):
        return None
    if argument(node, "dim") not in (-1, len(queue.axes) - 1) or not same_size(shape(index)[-1], 1):
        return None
    own = _ids_on(lift, index, queue.axes.replace("E", "1"))
    return Place(queue, queue.ids, queue.axes.replace("E", "1")) if own is queue.ids else None


def _ids_on(lift: Lift, node: object, axes: str) -> Node | None:
    """The ids under a view that puts them on `axes`; None where they are not on these."""
    while isinstance(node, Node) and node.op == "call_function" and is_tensor(node):
        name, below = operator_name(node), node.args[0]
        if name == "aten::unsqueeze" and axes.endswith("1") and argument(node, "dim") in (-1, len(axes) - 1):
            axes = axes[:-1]
        elif node.target in VIEWS and axes.endswith("1") and len(shape(node)) == 2 and axes[0] in "PQ":
            axes = axes[:-1]
            continue
        elif node.target in VIEWS and axes in ("P", "Q"):
            axes = {"P": "TK", "Q": "KT"}[axes]
        elif axes == "KT" and renamed(node, "TK") == "KT" and name != "aten::unsqueeze":
            axes = "TK"
        elif node.target not in CASTS | COPIES:
            break
        node = below
    root = lift.ids_root(node) if isinstance(node, Node) else None
    names = pair_axes(root[0]) if root is not None else ""
    return root[0] if root is not None and root[0] is node and names == axes else None


def one_hot_by_slot(lift: Lift, node: Node) -> Value | None:
    """one_hot of the ids slot by slot: ids.t(), ids.t().reshape(-1)."""
    experts = argument(node, "num_classes")
    if not isinstance(experts, int) or experts <= 0:
        return None
    axes = {1: "Q", 2: "KT"}.get(len(shape(node)) - 1)
    ids = _ids_on(lift, node.args[0], axes) if axes else None
    return None if ids is None or axes is None else OneHot(ids, experts, None, axes + "E")


def within(lift: Lift, node: Node) -> Value | None:
    """places < capacity, places <= last."""
    found, capacity = lift.of(node.args[0]), node.args[1]
    if not isinstance(found, (Queue, OwnPlaces, Place)):
        return None
    most = _whole(lift, capacity)
    if most is None:
        return None
    most -= int(operator_name(node) == "aten::lt")
    queue = found if isinstance(found, Queue) else found.queue
    of = found.ids if isinstance(found, Queue) else found.of
    if isinstance(found, Place) and found.most is not None:
        return None
    axes = found.axes if isinstance(found, Place) else queue.axes
    return Within(Limit(queue.counted, queue.before, most - queue.start), of, axes)


def _whole(lift: Lift, size: object) -> sympy.Expr | None:
    """A whole number, as an expression in sizes."""
    found = value(size) if isinstance(size, Node) and not is_tensor(size) else size
    is_number = isinstance(found, (int, torch.SymInt)) and not isinstance(found, bool)
    return lift.extent(found) if is_number else None


def bound(lift: Lift, node: Node) -> Value | None:
    """places.clamp(max=last): right for the pairs up to there."""
    found, low, high = lift.of(node.args[0]), argument(node, "min"), argument(node, "max")
    if not isinstance(found, Place) or found.most is not None:
        return None
    if low is not None and not (isinstance(low, int) and low <= found.queue.start):
        return None
    if high is None:
        return found
    most = _whole(lift, high)
    return None if most is None else replace(found, most=most)


def mask_place(lift: Lift, node: Node) -> Value | None:
    """place * kept: right for the pairs that are kept."""
    for place_at, mask_at in ((0, 1), (1, 0)):
        place, mask = lift.of(node.args[place_at]), node.args[mask_at]
        if not isinstance(place, Place) or not keeps(lift, mask):
            continue
        assert isinstance(mask, Node)
        if not same_shape(node, mask) or dtype(node) not in _EXACT:
            return None
        found = lift.of(mask)
        if isinstance(found, Flags) and found.axes == place.axes and descends(lift, found.ids, place.of):
            return replace(place, of=found.ids)
        known = isinstance(found, Within) and found.axes == place.axes and descends(lift, place.of, found.of)
        limit = found.limit if known and isinstance(found, Within) else None
        ids = dropped(lift, place.of, mask, place.axes, mask, limit)
        return None if ids is None else replace(place, of=ids)
    return None


def one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot(places, capacity)."""
    place, classes = lift.of(node.args[0]), _whole(lift, argument(node, "num_classes"))
    if not isinstance(place, Place) or classes is None or classes.is_negative:
        return None
    return PlaceHot(place, place.axes + "C", classes, node)


def compare(lift: Lift, node: Node) -> Value | None:
    """places.unsqueeze(-1) == arange(capacity)."""
    place, numbers = lift.of(node.args[0]), node.args[1]
    if not isinstance(place, Place) or not place.axes.endswith("1") or not isinstance(numbers, Node):
        return None
    if not isinstance(lift.of(numbers), Range) or len(shape(numbers)) != 1:
        return None
    return PlaceHot(place, place.axes[:-1] + "C", lift.extent(shape(numbers)[0]), node)


def cast(lift: Lift, node: Node) -> Value | None:
    """Places in a type that holds them; masks in any."""
    found = lift.of(node.args[0])
    if isinstance(found, (Within, Flags, PlaceHot)):
        return found
    return found if isinstance(found, (Queue, OwnPlaces, Place)) and dtype(node) in _EXACT else None


def rename(lift: Lift, node: Node) -> Value | None:
    """unsqueeze, squeeze, permute, transpose: the dimensions keep their names."""
    found = lift.of(node.args[0])
    if not isinstance(found, (OneHot, Queue, OwnPlaces, Place, PlaceHot, Within, Flags, KeptWeights)):
        return None
    old = found.queue.axes if isinstance(found, OwnPlaces) else found.axes
    new = renamed(node, old)
    if new is None:
        return None
    if isinstance(found, OwnPlaces):
        return OwnPlaces(replace(found.queue, axes=new), found.of)
    if isinstance(found, PlaceHot):
        return replace(found, axes=new, node=node)
    return replace(found, axes=new)


def renamed(node: Node, axes: str) -> str | None:
    """The names of the dimensions after a rearrangement; None where it is none."""
    rank = len(axes)
    order = list(range(rank))
    match operator_name(node):
        case "aten::unsqueeze":
            at = argument(node, "dim") % (rank + 1)
            return axes[:at] + "1" + axes[at:]
        case "aten::squeeze":
            dims = argument(node, "dim")
            gone = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims]) if d is not None}
            if not gone or any(axes[d] != "1" for d in gone):
                return None
            return "".join(a for i, a in enumerate(axes) if i not in gone)
        case "aten::permute":
            order = [d % rank for d in argument(node, "dims")]
        case "aten::transpose":
            i, j = (d % rank for d in node.args[1:3] if isinstance(d, int))
            order[i], order[j] = j, i
        case "aten::t" | "aten::mT" | "aten::numpy_T" if rank == 2:
            order.reverse()
        case "aten::mT":
            order[-2:] = order[:-3:-1]
        case _:
            return None
    return "".join(axes[d] for d in order)


def view(lift: Lift, node: Node) -> Value | None:
    """Pairs joined to one dimension, or taken apart again: (K, T, E) and (K·T, E), (T, K, E) and (T·K, E)."""
    found = lift.of(node.args[0])
    if not isinstance(found, (OneHot, Queue, Place, Within)) or (isinstance(found, OneHot) and found.place):
        return None
    ids = found.ids if isinstance(found, (OneHot, Queue)) else found.of
    source = node.args[0]
    assert isinstance(source, Node)
    if pair_axes(ids) != "TK" or any(a not in "TKPQE1" for a in found.axes):
        return None
    sizes = dict(zip(found.axes, shape(source), strict=True)) | dict(zip("TK", shape(ids), strict=True))
    axes = _viewed(found.axes.replace("1", ""), sizes, shape(node))
    return replace(found, axes=axes) if axes is not None else None


def _viewed(axes: str, sizes: dict[str, Size], new: tuple[Size, ...]) -> str | None:
    """The names of the new dimensions: the same ones, two joined or one taken apart, and sizes of 1."""
    sizes |= {"P": sizes["T"] * sizes["K"], "Q": sizes["K"] * sizes["T"]}
    several = [axes]
    for apart, joined in (("KT", "Q"), ("TK", "P")):
        several += [joined + axes[2:]] if axes[:2] == apart else []
        several += [apart + axes[1:]] if axes[:1] == joined else []
    return next((names for a in several if (names := _named(a, sizes, new)) is not None), None)


def _named(axes: str, sizes: dict[str, Size], new: tuple[Size, ...]) -> str | None:
    """The names on sizes, in their order, with "1" where a size is 1 and no name is left for it."""
    names, left = "", axes
    for i, size in enumerate(new):
        if left and same_size(size, sizes[left[0]]) and len(new) - i >= len(left):
            names, left = names + left[0], left[1:]
        elif same_size(size, 1):
            names += "1"
        else:
            return None
    return None if left else names


def largest_places(lift: Lift, ids: Node, queue: Queue) -> list[sympy.Expr]:
    """What is known to be the largest place in a queue of the pairs that are left in ids."""
    return [limit.most + queue.start for limit in limits_of(lift, ids) if of_queue(limit, queue)]


def of_queue(limit: Limit, queue: Queue) -> bool:
    """Whether a limit is one on this queue: the same pairs counted in the same order."""
    return (limit.counted, limit.before) == (queue.counted, queue.before)


def at_most(small: sympy.Expr, large: sympy.Expr) -> bool:
    """Whether one size is provably no larger than another."""
    return bool(sympy.expand(large - small).is_nonnegative)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::cumsum": (count_up,),
    "aten::add": (shift,),
    "aten::sub": (shift,),
    "aten::mul": (own_places, mask_place),
    "aten::sum": (own_place, totals),
    "aten::amax": (own_place,),
    "aten::max": (own_place,),
    "aten::gather": (place_at_id,),
    "aten::lt": (within,),
    "aten::le": (within,),
    "aten::clamp": (bound,),
    "aten::clamp_max": (bound,),
    "aten::one_hot": (one_hot, one_hot_by_slot),
    "aten::eq": (compare,),
    "aten::to": (cast,),
    "aten::_to_copy": (cast,),
    "aten::type_as": (cast,),
    "aten::unsqueeze": (rename,),
    "aten::squeeze": (rename,),
    "aten::permute": (rename,),
    "aten::transpose": (rename,),
    "aten::t": (rename,),
    "aten::mT": (rename,),
    "aten::view": (view,),
    "aten::reshape": (view,),
    "aten::_unsafe_view": (view,),
    "aten::flatten": (view,),
}
