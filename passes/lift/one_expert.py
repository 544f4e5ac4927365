"""Rules of code that visits one expert at a time: which pairs chose it, and their tokens, slots and weights.

ids == e                              a mask over (T, K), or over the flat pairs
one_hot(ids, E).permute(2, 1, 0)[e]   the same over (K, T)
(ids == e).any(-1)                    over tokens
where(mask)                           the pairs' tokens and slots
x[tokens], x[mask]                    token(x) of one expert's rows
w[tokens, slots], w[mask]             pair(w)
(w * (ids == e)).sum(-1)[mask]        pair(w)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, dtype, is_tensor, same_size, shape, value
from dsmoe_compiler.passes.lift.combine import vanishes
from dsmoe_compiler.passes.lift.discover import require_distinct, selected_from
from dsmoe_compiler.passes.lift.gather import is_pair_shaped
from dsmoe_compiler.passes.lift.state import Lift, NotStatic, PairSource, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Column,
    Coordinates,
    Everywhere,
    Filled,
    Mask,
    MaskedWeights,
    OneExpert,
    OneHot,
    Outside,
    Pairs,
    PartialSum,
    Parts,
    Permutation,
    Range,
    Rows,
    SlotOf,
    Spread,
    TokenOf,
    Value,
)

_ORDERS = {"TK": "token", "KT": "slot", "T": "token", "P": "token"}


def equals(lift: Lift, node: Node) -> Value | None:
    """ids == e."""
    ids, number = node.args[0], lift.constant(node.args[1])
    if not isinstance(ids, Node) or number is None:
        return None
    if (column := slot_of(ids)) is not None and (root := lift.ids_root(column[0])) is not None:
        return (
            Mask(root[0], root[1], number, "T", column[1])
            if _same(shape(column[0]), shape(root[0]))
            else None
        )
    if (root := lift.ids_root(ids)) is None:
        return None
    sizes, own = shape(ids), shape(root[0])
    if len(own) == 1:
        axes = "T"
    elif len(sizes) == 1:
        axes = "P"
    else:
        axes = "TK"
    return Mask(root[0], root[1], number, axes) if axes == "P" or _same(sizes, own) else None


def slot_of(node: Node) -> tuple[Node, int] | None:
    """(a (T, K) value, k) where the node is its column k."""
    if operator_name(node) == "aten::select":
        whole, dim, k = node.args[0], argument(node, "dim"), argument(node, "index")
    elif (
        operator_name(node) == "getitem"
        and operator_name(unbound := node.all_input_nodes[0]) == "aten::unbind"
    ):
        whole, dim, k = unbound.args[0], argument(unbound, "dim"), node.args[1]
    else:
        return None
    if not is_tensor(whole) or not isinstance(k, int) or dim not in (1, -1):
        return None
    assert isinstance(whole, Node)
    sizes = shape(whole)
    if len(sizes) != 2 or not isinstance(sizes[1], int) or sizes[1] == 1:
        return None
    return whole, k % sizes[1]


def hot_by_comparing(lift: Lift, node: Node) -> Value | None:
    """ids.unsqueeze(-1) == arange(E)."""
    ids, numbers = node.args[0], node.args[1]
    if not isinstance(ids, Node) or not isinstance(numbers, Node) or not isinstance(lift.of(numbers), Range):
        return None
    experts, below = shape(numbers)[0], ids.args[0] if ids.args else None
    if operator_name(ids) != "aten::unsqueeze" or not isinstance(below, Node) or not isinstance(experts, int):
        return None
    if argument(ids, "dim") not in (-1, len(shape(below))) or (root := lift.ids_root(below)) is None:
        return None
    if _same(shape(below), shape(root[0])):
        return OneHot(root[0], experts, None, "TKE" if len(shape(below)) == 2 else "TE")
    return OneHot(root[0], experts, None, "PE") if len(shape(below)) == 1 else None


def of_one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot[..., e], by select or by an index that is a constant."""
    hot = lift.of(node.args[0])
    if not isinstance(hot, OneHot) or hot.weight is not None:
        return None
    if operator_name(node) == "aten::select":
        at, number = argument(node, "dim") % len(hot.axes), argument(node, "index")
        kept = hot.axes[:at] + hot.axes[at + 1 :]
    else:
        indices = argument(node, "indices")
        at, number = len(indices) - 1, lift.constant(indices[-1])
        if any(i is not None for i in indices[:-1]):
            return None
        one = "1" if len(shape(node)) == len(hot.axes) else ""
        kept = hot.axes[:at] + one + hot.axes[at + 1 :]
    if hot.axes[at] != "E" or not isinstance(number, int):
        return None
    return _chosen(lift, hot, number % hot.experts, kept)


def _chosen(lift: Lift, hot: OneHot, expert: int, axes: str) -> Mask | None:
    """Where the one-hot holds 1 for an expert; `axes` are those left."""
    if axes.removeprefix("1") not in _ORDERS or (axes == "T" and len(shape(hot.ids)) != 1):
        return None
    root = lift.ids_root(hot.ids)
    return None if root is None else Mask(root[0], root[1], expert, axes)


def rearrange(lift: Lift, node: Node) -> Value | None:
    """permute, transpose, t of a one-hot or a mask."""
    found = lift.of(node.args[0])
    if not isinstance(found, (OneHot, Mask)) or (isinstance(found, OneHot) and found.weight is not None):
        return None
    rank = len(found.axes)
    order = list(range(rank))
    match operator_name(node):
        case "aten::permute":
            order = [d % rank for d in argument(node, "dims")]
        case "aten::transpose":
            i, j = (d % rank for d in node.args[1:3] if isinstance(d, int))
            order[i], order[j] = j, i
        case _:
            order.reverse()
    axes = "".join(found.axes[d] for d in order)
    if isinstance(found, Mask):
        return Mask(found.ids, found.slots, found.expert, axes) if axes in _ORDERS else None
    return OneHot(found.ids, found.experts, None, axes)


def any_slot(lift: Lift, node: Node) -> Value | None:
    """mask.any over the slots: which tokens chose the expert; a sum where the ids of a token differ."""
    found = lift.of(node.args[0])
    if not isinstance(found, Mask) or found.axes not in ("TK", "KT") or argument(node, "keepdim"):
        return None
    dims = argument(node, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    if [d % 2 for d in dims if isinstance(d, int)] != [found.axes.index("K")]:
        return None
    if operator_name(node) == "aten::sum":
        require_distinct(found.ids)
    return Mask(found.ids, found.slots, found.expert, "T")


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


def squeeze_mask(lift: Lift, node: Node) -> Value | None:
    """A mask over the one slot there is becomes one over tokens."""
    found = lift.of(node.args[0])
    if not isinstance(found, Mask):
        return None
    if len(shape(node)) == len(found.axes):
        return found
    dims = argument(node, "dim")
    dim = (dims if isinstance(dims, int) else dims[0]) % len(found.axes)
    kept = found.axes[:dim] + found.axes[dim + 1 :]
    if found.axes[dim] == "1" or (found.axes[dim] == "K" and found.slots == 1 and kept == "T"):
        return replace(found, axes=kept)
    return None


def first_of_mask(lift: Lift, node: Node) -> Value | None:
    """mask[0] of a mask with a dimension of size 1 in front."""
    found = lift.of(node.args[0])
    if not isinstance(found, Mask) or found.axes[0] != "1" or argument(node, "dim") != 0:
        return None
    return replace(found, axes=found.axes[1:])


def coordinates(lift: Lift, node: Node) -> Value | None:
    """where(mask), nonzero(mask, as_tuple=True): the tokens and slots of the pairs that chose the expert."""
    found = lift.of(node.args[0])
    if len(node.args) != 1 or not isinstance(found, Mask):
        return None
    domain = _listed(found)
    axes: dict[str, Value] = {"T": TokenOf(domain), "K": SlotOf(domain), "P": Permutation(domain)}
    return Parts(tuple(axes.get(a) for a in found.axes))


def coordinates_as_rows(lift: Lift, node: Node) -> Value | None:
    """nonzero(mask): a row (token, slot) a pair; of a vector, (n, 1), what flattens it keeps its meaning."""
    found = coordinates(lift, node)
    if not isinstance(found, Parts):
        return None
    return found.items[0] if len(found.items) == 1 else Coordinates(found.items)


def turn_coordinates(lift: Lift, node: Node) -> Value | None:
    """The transpose of such a matrix."""
    found = lift.of(node.args[0])
    if not isinstance(found, Coordinates):
        return None
    if operator_name(node) == "aten::transpose" and {d % 2 for d in node.args[1:3] if isinstance(d, int)} != {
        0,
        1,
    }:
        return None
    return Coordinates(found.items, not found.across)


def one_coordinate(lift: Lift, node: Node) -> Value | None:
    """nonzero(mask)[:, 0]: the tokens of the pairs."""
    found = lift.of(node.args[0])
    if not isinstance(found, Coordinates) or argument(node, "dim") % 2 != (not found.across):
        return None
    index: int = argument(node, "index")
    return found.items[index]


def unbind(lift: Lift, node: Node) -> Value | None:
    """All coordinates, or the masks of all experts."""
    found, dim = lift.of(node.args[0]), argument(node, "dim")
    if isinstance(found, Coordinates):
        return Parts(found.items) if dim % 2 == (not found.across) else None
    if not isinstance(found, OneHot) or found.weight is not None or found.axes[dim] != "E":
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


def spread(lift: Lift, node: Node) -> Value | None:
    """tokens.unsqueeze(-1).expand(-1, D): the rows' tokens, as scatter and gather take them."""
    found, sizes = lift.of(node.args[0]), shape(node)
    if isinstance(found, (TokenOf, Permutation)) and len(sizes) == 2 and same_size(sizes[1], 1):
        return Spread(found, 1)
    if not isinstance(found, Spread) or len(sizes) != 2 or not isinstance(sizes[1], int):
        return None
    if operator_name(node) == "aten::repeat" and argument(node, "repeats")[0] != 1:
        return None
    return Spread(found.at, sizes[1]) if found.width == 1 else None


def gather_rows(lift: Lift, node: Node) -> Value | None:
    """x.gather(0, tokens spread over the width)."""
    at, source = lift.of(argument(node, "index")), node.args[0]
    if not isinstance(at, Spread) or not isinstance(at.at, TokenOf) or argument(node, "dim") != 0:
        return None
    assert isinstance(source, Node)
    if not isinstance(at.at.domain, OneExpert) or shape(source)[1:] != (at.width,):
        return None
    return of_tokens(lift, source, at.at.domain)


def flattened(lift: Lift, node: Node) -> Value | None:
    """(n, 1) coordinates as a vector."""
    found = lift.of(node.args[0])
    single = isinstance(found, (TokenOf, Permutation)) and isinstance(found.domain, OneExpert)
    return found if single and len(shape(node)) == 1 else None


def _listed(mask: Mask) -> OneExpert:
    if mask.axes == "T" and mask.slot is None:
        require_distinct(mask.ids)
    return OneExpert(mask.ids, mask.slots, mask.expert, _ORDERS[mask.axes.removeprefix("1")], mask.slot)


def take_rows(lift: Lift, node: Node) -> Value | None:
    """source[tokens], source[tokens, slots], source[mask]."""
    source, indices = node.args[0], argument(node, "indices")
    assert isinstance(source, Node)
    found = [lift.of(i) for i in indices]
    if len(found) == 1 and isinstance(found[0], Mask) and found[0].axes[0] != "1":
        return _masked(lift, source, found[0])
    if len(found) == 1 and isinstance(found[0], TokenOf) and isinstance(found[0].domain, OneExpert):
        return of_tokens(lift, source, found[0].domain)
    if len(found) == 2 and indices[0] is None and source.target is aten.unsqueeze.default:
        return _in_front(lift, source, found[1])
    if len(found) == 2:
        return _of_pairs(lift, source, found[0], found[1])
    return None


def _in_front(lift: Lift, source: Node, at: Value | None) -> Value | None:
    """x[None, tokens]: the same rows with a dimension of size 1 before them."""
    below = source.args[0]
    if not isinstance(at, TokenOf) or not isinstance(at.domain, OneExpert) or argument(source, "dim") != 0:
        return None
    assert isinstance(below, Node)
    rows = of_tokens(lift, below, at.domain)
    return replace(rows, lead=2) if isinstance(rows, Rows) and rows.lead == 1 else None


def _masked(lift: Lift, source: Node, mask: Mask) -> Value | None:
    domain = _listed(mask)
    rows = lift.rows(source)
    if mask.axes == "T":
        return of_tokens(lift, source, domain)
    if rows is not None and isinstance(rows.domain, Pairs):
        pairs = rows.domain.meet(Pairs(mask.ids, mask.slots))
        if pairs is None or rows.lead != len(mask.axes) or mask.axes == "KT":
            return None
        return Rows(domain, rows.term, 1, rows.trail)
    if mask.axes == "KT" or not lift.opaque(source) or not value(source).is_floating_point():
        return None
    counted = shape(source)[: len(mask.axes)]
    if mask.axes == "TK" and not _same(counted, shape(mask.ids)):
        return None
    return _weights(lift, source, domain, _static(shape(source)[len(mask.axes) :]))


def of_tokens(lift: Lift, source: Node, domain: OneExpert) -> Value | None:
    """One value a token read at one expert's tokens: features, a column of weights, the sum so far."""
    found = lift.of(source)
    if isinstance(found, Column):
        return _at_column(found, domain)
    if (weight := _only_weight(lift, source, domain)) is not None:
        return _weights(lift, weight, domain, _static(shape(source)[1:]))
    if len(shape(source)) != 2 or not value(source).is_floating_point():
        return _column_of_matrix(lift, source, domain)
    if isinstance(found, (PartialSum, Filled)) or lift.opaque(source):
        return Rows(domain, lift.token(source), 1, _static(shape(source)[1:]))
    return None


def _only_weight(lift: Lift, source: Node, domain: OneExpert) -> Node | None:
    """The (T, K) or (T,) weights of which `source` holds the one that each token has for these rows: where
    the tokens have one id, or the rows are those of one slot.
    """
    if domain.slot is None:
        whole: Node | None = source if domain.slots == 1 and is_pair_shaped(source, domain) else None
    else:
        column = slot_of(_without_ones(source))
        fits = column is not None and column[1] == domain.slot and is_pair_shaped(column[0], domain)
        whole = column[0] if column is not None and fits else None
    return whole if whole is not None and lift.opaque(whole) else None


def _without_ones(node: Node) -> Node:
    """A vector under dimensions of size 1 added behind it."""
    while operator_name(node) in ("aten::unsqueeze", "aten::view", "aten::reshape") and len(shape(node)) == 2:
        below = node.args[0]
        if not isinstance(below, Node) or len(shape(below)) != 1 or not same_size(shape(node)[1], 1):
            break
        node = below
    return node


def _at_column(column: Column, domain: OneExpert) -> Value | None:
    own = column.domain
    if (own.ids, own.expert) != (domain.ids, domain.expert):
        return None
    if own.order != domain.order:
        require_distinct(domain.ids)
    return Rows(domain, column.term, 1, column.trail)


def _column_of_matrix(lift: Lift, source: Node, domain: OneExpert) -> Value | None:
    """scores[:, e][tokens], scores being (T, E)."""
    if operator_name(source) != "aten::select" or argument(source, "dim") not in (1, -1):
        return None
    matrix = source.args[0]
    if not isinstance(matrix, Node) or argument(source, "index") != domain.expert or len(shape(matrix)) != 2:
        return None
    if not lift.opaque(matrix) or not value(matrix).is_floating_point():
        return None
    if shape(matrix)[1] != selected_from(domain.ids):
        return None
    return Rows(domain, lift.pair(PairSource(matrix, domain.ids, matrix=True)), 1, ())


def _of_pairs(lift: Lift, source: Node, first: Value | None, second: Value | None) -> Value | None:
    """w[tokens, slots], or w[slots, tokens] of the transposed."""
    if not isinstance(first, TokenOf) or not isinstance(second, SlotOf) or first.domain != second.domain:
        return None
    domain = second.domain
    if len(shape(domain.ids)) != 2 or not _same(shape(source)[:2], shape(domain.ids)):
        return None
    rows = lift.rows(source)
    if rows is not None and isinstance(rows.domain, Pairs) and rows.lead == 2:
        own = Pairs(domain.ids, domain.slots)
        return Rows(domain, rows.term, 1, rows.trail) if rows.domain.meet(own) else None
    if not lift.opaque(source) or not value(source).is_floating_point():
        return None
    return _weights(lift, source, domain, _static(shape(source)[2:]))


def _weights(lift: Lift, source: Node, domain: OneExpert, trail: tuple[int, ...]) -> Rows | None:
    if any(size != 1 for size in trail):
        return None
    return Rows(domain, lift.pair(PairSource(source)), 1, trail)


def mask_weights(lift: Lift, node: Node) -> Value | None:
    """w * (ids == e), w (T, K)."""
    for mask_at, weight_at in ((0, 1), (1, 0)):
        mask, weight = lift.of(node.args[mask_at]), node.args[weight_at]
        if not isinstance(mask, Mask) or mask.axes != "TK" or not is_tensor(weight):
            continue
        assert isinstance(weight, Node)
        if not lift.opaque(weight) or not value(weight).is_floating_point() or dtype(node) != dtype(weight):
            continue
        if _same(shape(weight), shape(mask.ids)):
            return MaskedWeights(_listed(mask), lift.pair(PairSource(weight)))
    return None


def select_weights(lift: Lift, node: Node) -> Value | None:
    """where(ids == e, w, 0)."""
    if len(node.args) != 3:
        return None
    mask, weight, other = lift.of(node.args[0]), node.args[1], node.args[2]
    zero = other == 0 or (isinstance(found := lift.of(other), Filled) and found.number == 0)
    if not isinstance(mask, Mask) or mask.axes != "TK" or not zero or not is_tensor(weight):
        return None
    assert isinstance(weight, Node)
    if not lift.opaque(weight) or not _same(shape(weight), shape(mask.ids)) or dtype(node) != dtype(weight):
        return None
    return MaskedWeights(_listed(mask), lift.pair(PairSource(weight)))


def fill_weights(lift: Lift, node: Node) -> Value | None:
    """w.masked_fill(ids != e, 0)."""
    weight, found, number = node.args[0], lift.of(argument(node, "mask")), argument(node, "value")
    if not isinstance(found, Outside) or number != 0 or found.mask.axes != "TK":
        return None
    if not lift.opaque(weight) or not _same(shape(weight), shape(found.mask.ids)):  # type: ignore[arg-type]
        return None
    assert isinstance(weight, Node)
    if not value(weight).is_floating_point():
        return None
    return MaskedWeights(_listed(found.mask), lift.pair(PairSource(weight)))


def sum_weights(lift: Lift, node: Node) -> Value | None:
    """The sum of masked weights over the slots: the token's weight for the expert."""
    found = lift.of(node.args[0])
    if not isinstance(found, MaskedWeights) or argument(node, "dtype") is not None:
        return None
    dims = argument(node, "dim")
    if [d % 2 for d in dims or []] != [1]:
        return None
    require_distinct(found.domain.ids)
    return Column(found.domain, found.term, (1,) if argument(node, "keepdim") else (), zero=True)


def select_column(lift: Lift, node: Node) -> Value | None:
    """dense weights (T, E)[:, e]."""
    rows = lift.rows(node.args[0])
    if rows is None or not isinstance(rows.domain, Everywhere) or rows.domain.axis != 1 or rows.lead != 2:
        return None
    leaves = lift.terms.leaves(rows.term, "pair")
    ids = {lift.sources[str(leaf.attrs[0])].ids for leaf in leaves}
    if argument(node, "dim") != 1 or len(ids) != 1 or (only := ids.pop()) is None:
        return None
    root = lift.ids_root(only)
    if root is None:
        return None
    domain = OneExpert(*root, argument(node, "index"), "token")
    return Column(domain, rows.term, rows.trail, zero=vanishes(lift, rows.term))


def column_dimensions(lift: Lift, node: Node) -> Value | None:
    """A dimension of size 1 beside a column's numbers."""
    found = lift.of(node.args[0])
    if not isinstance(found, Column):
        return None
    sizes = shape(node)
    if len(sizes) > 2 or not same_size(sizes[0], shape(found.domain.ids)[0]):
        return None
    return replace(found, trail=_static(sizes[1:]))


def cast_weights(lift: Lift, node: Node) -> Value | None:
    """A column or masked weights in another floating dtype."""
    found = lift.of(node.args[0])
    if not isinstance(found, (Column, MaskedWeights)) or not value(node).is_floating_point():
        return None
    term = lift.terms.number("cast", (found.term,), (str(dtype(node)).removeprefix("torch."),))
    if isinstance(found, Column):
        return replace(found, term=term)
    return MaskedWeights(found.domain, term)


def _same(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def _static(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
    if not all(isinstance(s, int) for s in sizes):
        raise NotStatic
    return tuple(int(s) for s in sizes)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::eq": (truth, equals, hot_by_comparing),
    "aten::gt": (truth,),
    "aten::ne": (truth, outside),
    "aten::bitwise_not": (outside,),
    "aten::logical_not": (outside,),
    "aten::masked_fill": (fill_weights,),
    "aten::unbind": (unbind,),
    "aten::gather": (gather_rows,),
    "aten::expand": (spread,),
    "aten::expand_as": (spread,),
    "aten::repeat": (spread,),
    "aten::ge": (truth,),
    "aten::select": (of_one_hot, first_of_mask, one_coordinate, select_column, flattened),
    "aten::index": (of_one_hot, take_rows),
    "aten::permute": (rearrange,),
    "aten::transpose": (rearrange, turn_coordinates),
    "aten::t": (rearrange, turn_coordinates),
    "aten::mT": (rearrange, turn_coordinates),
    "aten::any": (any_slot,),
    "aten::amax": (any_slot,),
    "aten::sum": (any_slot, sum_weights),
    "aten::to": (truth, cast_weights),
    "aten::_to_copy": (truth, cast_weights),
    "aten::type_as": (cast_weights,),
    "aten::contiguous": (truth,),
    "aten::clone": (truth,),
    "aten::where": (coordinates, select_weights),
    "aten::nonzero_numpy": (coordinates,),
    "aten::nonzero": (coordinates_as_rows,),
    "aten::argwhere": (coordinates_as_rows,),
    "aten::mul": (mask_weights,),
    "aten::unsqueeze": (column_dimensions, spread),
    "aten::squeeze": (squeeze_mask, flattened),
    "aten::view": (flattened, column_dimensions, spread),
    "aten::reshape": (flattened, column_dimensions, spread),
    "aten::flatten": (flattened,),
}
