"""Rules by which rows begin: tokens repeated or gathered, experts' tensors gathered by ids, weights permuted.

x[perm // K]              token(x)      in sorted order
repeat_interleave(x, K)   token(x)      in the pairs' own order
arange(T).repeat_interleave(K)[perm]    the token of each row
P[ids]                    expert(P)     in the pairs' own order
x.repeat(E, 1)            token(x)      every token for every expert
v.reshape(-1)[perm]       pair(v)       in sorted order
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import VIEWS, aten, same_size, same_sizes, shape, value
from dsmoe_compiler.passes.lift.axes import count_tokens
from dsmoe_compiler.passes.lift.state import (
    Lift,
    PairSource,
    Rule,
    Unproven,
    argument,
    has_slots,
    operator_name,
    static,
)
from dsmoe_compiler.passes.lift.values import (
    Everywhere,
    InversePermutation,
    OneExpert,
    Pairs,
    Permutation,
    Range,
    Rows,
    SortedIds,
    TokenOf,
    Value,
)


def index(lift: Lift, node: Node) -> Value | None:
    """source[index] along the first dimension (index, index_select)."""
    source = node.args[0]
    assert isinstance(source, Node)
    if "index_select" in str(node.target):
        if argument(node, "dim") != 0:
            return None
        at = node.args[2]
    else:
        indices = argument(node, "indices")
        if len(indices) != 1:
            return None
        at = indices[0]
    assert isinstance(at, Node)
    return _take(lift, source, at)


def embedding(lift: Lift, node: Node) -> Value | None:
    """embedding(P, ids): a two-dimensional expert tensor gathered by ids."""
    table, at = node.args[0], node.args[1]
    assert isinstance(table, Node) and isinstance(at, Node)
    return _take(lift, table, at) if isinstance(lift.of(at), SortedIds) else None


def _take(lift: Lift, source: Node, at: Node) -> Value | None:
    rows, position, found = lift.rows(source), lift.of(at), lift.of(source)
    if rows is not None:
        return _reorder(rows, position)
    if isinstance(found, TokenOf) and isinstance(position, Permutation):
        return TokenOf(position.domain) if found.domain == Pairs(None, position.domain.slots) else None
    if isinstance(position, TokenOf) and lift.opaque(source) and len(shape(source)) == 2:
        slots = position.domain.slots
        numbered = position.domain == Pairs(None, slots)
        if numbered and not same_size(shape(at)[0], shape(source)[0] * slots):
            return None
        return Rows(position.domain, lift.token(source), 1, static(shape(source)[1:]))
    if isinstance(position, Permutation) and lift.opaque(source):
        return _permuted_weights(lift, source, position)
    if (parameter := lift.expert_parameter(source)) is None:
        return None
    if isinstance(position, SortedIds):
        domain, lead = position.domain, 1
    else:
        root = lift.ids_root(at)
        if root is None or (len(shape(at)) > 1 and not has_slots(root[0])):
            return None
        domain, lead = Pairs(*root), len(shape(at))
    tensor, flipped = parameter
    trail = static(shape(source)[1:])
    if len(trail) > 2 or (len(trail) == 2 and 1 in trail):
        return None
    return Rows(domain, lift.expert(tensor), lead, trail, flipped)


def _reorder(rows: Rows, position: Value | None) -> Value | None:
    if rows.lead != 1 or not isinstance(rows.domain, Pairs):
        return None
    if isinstance(position, InversePermutation) and rows.domain == position.domain:
        return rows.like(rows.term, domain=Pairs(rows.domain.ids, rows.domain.slots))
    if isinstance(position, Permutation):
        own = Pairs(position.domain.ids, position.domain.slots)
        if rows.domain.meet(own) is not None:
            return rows.like(rows.term, domain=position.domain)
    if rows.domain.order is not None and isinstance(position, (Permutation, InversePermutation)):
        raise Unproven(
            "R402", "sorted rows are brought back by something that is not the inverse of their sort"
        )
    return None


def _permuted_weights(lift: Lift, source: Node, position: Permutation) -> Value | None:
    if not is_pair_shaped(source, position.domain) or len(shape(source)) > 2:
        return None
    return Rows(position.domain, lift.pair(PairSource(source)), 1, static(shape(source)[1:]))


def is_pair_shaped(node: Node, domain: Pairs | OneExpert) -> bool:
    """Whether a value holds one number a pair: shaped as the ids, with the tokens in one dimension or
    flattened, perhaps with a final 1.
    """
    if domain.ids is None or not value(node).is_floating_point():
        return False
    sizes, own, tokens = shape(node), shape(domain.ids), count_tokens(domain.ids)
    shapes = (own, (tokens, domain.slots), (tokens * domain.slots,))
    if sizes and same_size(sizes[-1], 1) and not same_sizes(sizes, own):
        sizes = sizes[:-1]
    return any(same_sizes(sizes, s) for s in shapes)


def repeat_interleave(lift: Lift, node: Node) -> Value | None:
    """repeat_interleave(x, K, dim=0): each token K times, in the order of pairs."""
    tokens, slots = node.args[0], node.args[1]
    if (
        isinstance(slots, int)
        and isinstance(lift.of(tokens), Range)
        and argument(node, "dim") in (None, 0, -1)
    ):
        return TokenOf(Pairs(None, slots))
    if not isinstance(slots, int) or argument(node, "dim") != 0 or not lift.opaque(tokens):
        return None
    assert isinstance(tokens, Node)
    if len(shape(tokens)) != 2 or not value(tokens).is_floating_point():
        return None
    return Rows(Pairs(None, slots), lift.token(tokens), 1, static(shape(tokens)[1:]))


def spread_numbers(lift: Lift, node: Node) -> Value | None:
    """arange(T).unsqueeze(1).expand(-1, K).reshape(-1): the token of each pair in its own order."""
    spread = node.args[0]
    assert isinstance(spread, Node)
    if len(shape(node)) == 1 and operator_name(spread) in ("aten::expand", "aten::repeat"):
        column, slots = spread.args[0], shape(spread)[-1]
        if not isinstance(column, Node) or not isinstance(slots, int) or len(shape(spread)) != 2:
            return None
        numbers = column.args[0] if operator_name(column) in ("aten::unsqueeze", "aten::view") else None
        one = same_size(shape(column)[-1], 1) and same_size(shape(column)[0], shape(spread)[0])
        if one and len(shape(column)) == 2 and isinstance(lift.of(numbers), Range):
            return TokenOf(Pairs(None, slots))
    return None


def repeat(lift: Lift, node: Node) -> Value | None:
    """x.repeat(E, 1): every token for every expert."""
    tokens, times = node.args[0], argument(node, "repeats")
    if (
        not lift.opaque(tokens)
        or len(times) != 2
        or times[1] != 1
        or not isinstance(times[0], int)
        or times[0] < 2
    ):
        return None
    assert isinstance(tokens, Node)
    if len(shape(tokens)) != 2 or not value(tokens).is_floating_point():
        return None
    return Rows(Everywhere(times[0]), lift.token(tokens), 1, static(shape(tokens)[1:]))


def expand(lift: Lift, node: Node) -> Value | None:
    """x.unsqueeze(0).expand(E, T, D), x.unsqueeze(1).expand(T, K, D); rows expanded to their own sizes."""
    source = node.args[0]
    assert isinstance(source, Node)
    sizes = shape(node)
    if (rows := lift.rows(source)) is not None:
        same_rows = same_sizes(sizes[: rows.lead], shape(source)[: rows.lead])
        return rows if same_rows and same_sizes(rows.trail, sizes[rows.lead :]) else None
    if source.target is not aten.unsqueeze.default or not lift.opaque(source.args[0]) or len(sizes) != 3:
        return None
    tokens, at = source.args[0], argument(source, "dim")
    assert isinstance(tokens, Node)
    many = sizes[at] if at in (0, 1) else None
    if len(shape(tokens)) != 2 or not isinstance(many, int) or not value(tokens).is_floating_point():
        return None
    if not same_sizes(shape(tokens), (sizes[1 - at], sizes[2])):
        return None
    domain = Everywhere(many) if at == 0 else Pairs(None, many)
    return Rows(domain, lift.token(tokens), 2, static(shape(tokens)[1:]))


def tokens_everywhere(lift: Lift, node: Node, experts: int, rank: int = 2) -> Rows | None:
    """x (T, D) or x (1, T, D) where a product broadcasts it over the experts; x of `rank` dimensions."""
    below = node.args[0] if node.op == "call_function" and node.args else None
    in_front = node.target is aten.unsqueeze.default or node.target in VIEWS
    if in_front and isinstance(below, Node) and same_sizes(shape(node), (1, *shape(below))):
        node = below
    if not lift.opaque(node) or len(shape(node)) != rank or not value(node).is_floating_point():
        return None
    return Rows(Everywhere(experts), lift.token(node), rank, static(shape(node)[-1:]))


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::index": (index,),
    "aten::index_select": (index,),
    "aten::embedding": (embedding,),
    "aten::repeat_interleave": (repeat_interleave,),
    "aten::repeat": (repeat,),
    "aten::view": (spread_numbers,),
    "aten::reshape": (spread_numbers,),
    "aten::flatten": (spread_numbers,),
    "aten::expand": (expand,),
}
