"""Rules of masks: which pairs chose one expert.

ids == e                              a mask over (T, K), over (T,) if an argmax gave the ids, or flat pairs
one_hot(ids, E).permute(2, 1, 0)[e]   the same over (K, T)
(ids == e).any(-1)                    over tokens
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import dtype, is_tensor, same_sizes, shape
from dsmoe_compiler.passes.lift.axes import order_of, pair_axes, token_axes, viewed
from dsmoe_compiler.passes.lift.discover import require_distinct
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import Mask, OneExpert, OneHot, Outside, Parts, Range, Value

# In which order a mask with these dimensions lists its pairs.
_ORDERS = {"TK": "token", "KT": "slot", "T": "token", "P": "token"}


def equals(lift: Lift, node: Node) -> Value | None:
    """ids == e."""
    ids, number = node.args[0], lift.constant(node.args[1])
    if not isinstance(ids, Node) or number is None:
        return None
    if (column := slot_of(ids)) is not None and (root := lift.ids_root(column[0])) is not None:
        whole = same_sizes(shape(column[0]), shape(root[0]))
        return Mask(*root, number, token_axes(root[0]), column[1]) if whole else None
    if (root := lift.ids_root(ids)) is None:
        return None
    axes = viewed(pair_axes(root[0]), root[0], root[1], shape(root[0]), shape(ids))
    return None if axes is None else Mask(*root, number, axes)


def slot_of(node: Node) -> tuple[Node, int] | None:
    """(a (…, K) value, k) where the node is its column k."""
    if operator_name(node) == "aten::select":
        whole, dim, k = node.args[0], argument(node, "dim"), argument(node, "index")
    elif (
        operator_name(node) == "getitem"
        and operator_name(unbound := node.all_input_nodes[0]) == "aten::unbind"
    ):
        whole, dim, k = unbound.args[0], argument(unbound, "dim"), node.args[1]
    else:
        return None
    if not is_tensor(whole) or not isinstance(k, int):
        return None
    assert isinstance(whole, Node)
    sizes = shape(whole)
    last = sizes[-1]
    if len(sizes) < 2 or dim not in (-1, len(sizes) - 1) or not isinstance(last, int) or last == 1:
        return None
    return whole, k % last


def hot_by_comparing(lift: Lift, node: Node) -> Value | None:
    """ids.unsqueeze(-1) == arange(E)."""
    ids, numbers = node.args[0], node.args[1]
    if not isinstance(ids, Node) or not isinstance(numbers, Node) or not isinstance(lift.of(numbers), Range):
        return None
    experts, below = shape(numbers)[0], ids.args[0] if ids.args else None
    if operator_name(ids) != "aten::unsqueeze" or not isinstance(below, Node) or not isinstance(experts, int):
        return None
    if argument(ids, "dim") not in (-1, len(shape(below))):
        return None
    return hot(lift, below, experts)


def hot(lift: Lift, ids: Node, experts: int) -> OneHot | None:
    """The one-hot of ids, which has their dimensions and one for the experts.

    A one-hot of 0 and 1 may itself be read as ids.
    """
    if plain(lift.of(ids)) is not None:
        lift.numbers.add(ids)
    if (root := lift.ids_root(ids)) is None:
        return None
    axes = viewed(pair_axes(root[0]), root[0], root[1], shape(root[0]), shape(ids))
    return None if axes is None else OneHot(root[0], experts, None, f"{axes}E")


def of_one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot[..., e], by select or by an index that is a constant."""
    found = plain(lift.of(node.args[0]))
    if found is None:
        return None
    if operator_name(node) == "aten::select":
        at, number = argument(node, "dim") % len(found.axes), argument(node, "index")
        kept = found.axes[:at] + found.axes[at + 1 :]
    else:
        indices = argument(node, "indices")
        at, number = len(indices) - 1, lift.constant(indices[-1])
        if any(i is not None for i in indices[:-1]):
            return None
        one = "1" if len(shape(node)) == len(found.axes) else ""
        kept = found.axes[:at] + one + found.axes[at + 1 :]
    if found.axes[at] != "E" or not isinstance(number, int):
        return None
    return _chosen(lift, found, number % found.experts, kept)


def plain(found: Value | None) -> OneHot | None:
    """A one-hot that holds 1 for every pair, none weighed, placed or hidden."""
    return (
        found
        if isinstance(found, OneHot) and found == OneHot(found.ids, found.experts, None, found.axes)
        else None
    )


def _chosen(lift: Lift, hot: OneHot, expert: int, axes: str) -> Mask | None:
    """Where the one-hot holds 1 for an expert; `axes` are those left."""
    root = lift.ids_root(hot.ids)
    if root is None or order_of(axes, root[0]) not in _ORDERS:
        return None
    if order_of(axes, root[0]) == "T" and root[1] > 1:
        return None
    return Mask(*root, expert, axes)


def rearrange(lift: Lift, node: Node) -> Value | None:
    """permute, transpose, t of a one-hot or a mask."""
    found = lift.of(node.args[0])
    if not isinstance(found, (OneHot, Mask)) or (isinstance(found, OneHot) and plain(found) is None):
        return None
    rank = len(found.axes)
    order = list(range(rank))
    match operator_name(node):
        case "aten::permute":
            order = [d % rank for d in argument(node, "dims")]
        case "aten::transpose":
            i, j = (d % rank for d in node.args[1:3] if isinstance(d, int))
            order[i], order[j] = j, i
        case "aten::mT":
            order[-2:] = order[:-3:-1]
        case _:
            order.reverse()
    axes = "".join(found.axes[d] for d in order)
    return replace(found, axes=axes)


def view(lift: Lift, node: Node) -> Value | None:
    """A view that joins the tokens' dimensions, or adds and drops dimensions of size 1."""
    found, source = lift.of(node.args[0]), node.args[0]
    if not isinstance(found, (OneHot, Mask)) or (isinstance(found, OneHot) and plain(found) is None):
        return None
    assert isinstance(source, Node)
    root = lift.ids_root(found.ids)
    if root is None or len(found.axes) != len(shape(source)):
        return None
    axes = viewed(found.axes, *root, shape(source), shape(node))
    return None if axes is None else replace(found, axes=axes)


def any_slot(lift: Lift, node: Node) -> Value | None:
    """mask.any over the slots: which tokens chose the expert; a sum where the ids of a token differ."""
    found = lift.of(node.args[0])
    if not isinstance(found, Mask) or "K" not in found.axes:
        return None
    dims = argument(node, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    at, rank = found.axes.index("K"), len(found.axes)
    if [d % rank for d in dims if isinstance(d, int)] != [at]:
        return None
    if operator_name(node) == "aten::sum":
        require_distinct(found.ids)
    kept = "1" if argument(node, "keepdim") else ""
    return replace(found, axes=found.axes[:at] + kept + found.axes[at + 1 :])


def truth(lift: Lift, node: Node) -> Value | None:
    """A mask of 0 and 1 cast, or compared so that it stays what it is."""
    found = lift.of(node.args[0])
    if not isinstance(found, Mask):
        return None
    match operator_name(node):
        case "aten::gt" | "aten::ne":
            return found if node.args[1] == 0 else None
        case "aten::eq" | "aten::ge":
            return found if node.args[1] == 1 else None
    return found


def first_of_mask(lift: Lift, node: Node) -> Value | None:
    """mask[0] along a dimension of size 1."""
    found = lift.of(node.args[0])
    if not isinstance(found, Mask):
        return None
    at = argument(node, "dim") % len(found.axes)
    if found.axes[at] != "1":
        return None
    return replace(found, axes=found.axes[:at] + found.axes[at + 1 :])


def unbind(lift: Lift, node: Node) -> Value | None:
    """The masks of all experts."""
    found, dim = plain(lift.of(node.args[0])), argument(node, "dim")
    if found is None or found.axes[dim] != "E":
        return None
    masks = [_chosen(lift, found, e, found.axes.replace("E", "")) for e in range(found.experts)]
    return Parts(tuple(masks))


def outside(lift: Lift, node: Node) -> Value | None:
    """~mask, ids != e."""
    found = lift.of(node.args[0])
    if operator_name(node) == "aten::ne":
        found = equals(lift, node)
    elif isinstance(found, Outside):
        return found.mask
    elif not isinstance(found, Mask) or dtype(node) != torch.bool:
        return None
    return Outside(found) if isinstance(found, Mask) else None


def listing(mask: Mask) -> str | None:
    """ "T", "TK", "KT" or "P": the dimensions by which the mask lists its pairs; None for another order."""
    order = order_of(mask.axes, mask.ids)
    return order if order in _ORDERS else None


def listed(mask: Mask) -> OneExpert | None:
    """The pairs in the order in which the mask lists them; None for no order that is known.

    Raises Unproven where a token would be listed once, though several of its ids may be the expert's.
    """
    order = listing(mask)
    if order is None:
        return None
    if order == "T" and mask.slot is None:
        require_distinct(mask.ids)
    return OneExpert(mask.ids, mask.slots, mask.expert, _ORDERS[order], mask.slot)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::eq": (truth, equals, hot_by_comparing),
    "aten::gt": (truth,),
    "aten::ne": (truth, outside),
    "aten::ge": (truth,),
    "aten::bitwise_not": (outside,),
    "aten::logical_not": (outside,),
    "aten::unbind": (unbind,),
    "aten::select": (of_one_hot, first_of_mask),
    "aten::index": (of_one_hot,),
    "aten::permute": (rearrange,),
    "aten::transpose": (rearrange,),
    "aten::t": (rearrange,),
    "aten::mT": (rearrange,),
    "aten::view": (view,),
    "aten::reshape": (view,),
    "aten::flatten": (view,),
    "aten::unsqueeze": (view,),
    "aten::squeeze": (view,),
    "aten::any": (any_slot,),
    "aten::amax": (any_slot,),
    "aten::sum": (any_slot,),
    "aten::to": (truth,),
    "aten::_to_copy": (truth,),
    "aten::type_as": (truth,),
    "aten::contiguous": (truth,),
    "aten::clone": (truth,),
}
