"""Rules of code that visits one expert at a time: the rows and weights that it takes.

x[tokens], x[batch, position], x[mask]    token(x) of one expert's rows
w[tokens, slots], w[mask]                 pair(w)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, same_size, same_sizes, shape, value
from dsmoe_compiler.passes.lift.coordinates import Located, located
from dsmoe_compiler.passes.lift.discover import require_distinct, selected_from
from dsmoe_compiler.passes.lift.gather import is_pair_shaped
from dsmoe_compiler.passes.lift.kept import descends
from dsmoe_compiler.passes.lift.masks import slot_of
from dsmoe_compiler.passes.lift.state import (
    Lift,
    PairSource,
    Rule,
    argument,
    operator_name,
    static,
)
from dsmoe_compiler.passes.lift.values import (
    Column,
    Filled,
    OneExpert,
    Pairs,
    PartialSum,
    Rows,
    Spread,
    TokenOf,
    Value,
)


def take_rows(lift: Lift, node: Node) -> Value | None:
    """source[tokens], source[tokens, slots], source[mask]."""
    source, indices = node.args[0], argument(node, "indices")
    assert isinstance(source, Node)
    if len(indices) == 2 and indices[0] is None and source.target is aten.unsqueeze.default:
        return _in_front(lift, source, indices[1:])
    at = located(lift, indices, source)
    if at is None:
        return None
    if at.pairs or at.domain.slots == 1:
        rows = lift.rows(source)
        if rows is not None and isinstance(rows.domain, Pairs):
            own = rows.domain.meet(Pairs(at.domain.ids, at.domain.slots))
            return Rows(at.domain, rows.term, 1, rows.trail) if own and rows.lead == at.rank else None
    return _of_pairs(lift, source, at) if at.pairs else _of_tokens(lift, source, at)


def take_index(lift: Lift, node: Node) -> Value | None:
    """x.index_select(0, tokens)."""
    source, tokens = node.args[0], node.args[2]
    assert isinstance(source, Node) and isinstance(tokens, Node)
    at = located(lift, [tokens], source) if argument(node, "dim") == 0 else None
    return _of_tokens(lift, source, at) if at is not None and not at.pairs else None


def gather_rows(lift: Lift, node: Node) -> Value | None:
    """x.gather(0, tokens spread over the width)."""
    at, source = lift.of(argument(node, "index")), node.args[0]
    if not isinstance(at, Spread) or not isinstance(at.at, TokenOf) or argument(node, "dim") != 0:
        return None
    assert isinstance(source, Node)
    if not isinstance(at.at.domain, OneExpert) or shape(source)[1:] != (at.width,):
        return None
    return _of_tokens(lift, source, Located(at.at.domain, pairs=False, sizes=shape(source)[:1]))


def _in_front(lift: Lift, source: Node, indices: Sequence[Node]) -> Value | None:
    """x[None, tokens]: the same rows with a dimension of size 1 before them."""
    below = source.args[0]
    assert isinstance(below, Node)
    at = located(lift, indices, below)
    if at is None or at.pairs or argument(source, "dim") != 0:
        return None
    rows = _of_tokens(lift, below, at)
    return replace(rows, lead=2) if isinstance(rows, Rows) and rows.lead == 1 else None


def _of_pairs(lift: Lift, source: Node, at: Located) -> Value | None:
    """w[tokens, slots], w[mask], w.flatten()[pairs]."""
    if not lift.opaque(source) or not value(source).is_floating_point():
        return None
    if not same_sizes(shape(source)[: at.rank], at.sizes):
        return None
    return _weights(lift, source, at.domain, static(shape(source)[at.rank :]))


def _of_tokens(lift: Lift, source: Node, at: Located) -> Value | None:
    """One value a token read at one expert's tokens: features, a column of weights, the sum so far."""
    found, domain, rank = lift.of(source), at.domain, at.rank
    if isinstance(found, Column):
        return _at_column(lift, found, domain) if len(shape(source)) - len(found.trail) == rank else None
    if (weight := _only_weight(lift, source, domain)) is not None:
        return _weights(lift, weight, domain, static(shape(source)[rank:]))
    if len(shape(source)) != rank + 1 or not value(source).is_floating_point():
        return _column_of_matrix(lift, source, at)
    if isinstance(found, (PartialSum, Filled)) or lift.opaque(source):
        return Rows(domain, lift.token(source), 1, static(shape(source)[rank:]))
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
    """A value under a dimension of size 1 added behind it."""
    while operator_name(node) in ("aten::unsqueeze", "aten::view", "aten::reshape"):
        below = node.args[0]
        if not isinstance(below, Node) or not same_size(shape(node)[-1], 1):
            break
        if not same_sizes(shape(node)[:-1], shape(below)):
            break
        node = below
    return node


def _at_column(lift: Lift, column: Column, domain: OneExpert) -> Value | None:
    own = column.domain
    if not descends(lift, domain.ids, own.ids) or own.expert != domain.expert:
        return None
    if own.order != domain.order:
        require_distinct(domain.ids)
    return Rows(domain, column.term, 1, column.trail)


def _column_of_matrix(lift: Lift, source: Node, at: Located) -> Value | None:
    """scores[:, e][tokens], scores being (T, E)."""
    matrix, domain = source.args[0], at.domain
    if operator_name(source) != "aten::select" or argument(source, "dim") not in (at.rank, -1):
        return None
    if not isinstance(matrix, Node) or argument(source, "index") != domain.expert:
        return None
    if len(shape(matrix)) != at.rank + 1 or not lift.opaque(matrix):
        return None
    if not value(matrix).is_floating_point() or shape(matrix)[-1] != selected_from(domain.ids):
        return None
    return Rows(domain, lift.pair(PairSource(matrix, domain.ids, matrix=True)), 1, ())


def _weights(lift: Lift, source: Node, domain: OneExpert, trail: tuple[int, ...]) -> Rows | None:
    if any(size != 1 for size in trail):
        return None
    return Rows(domain, lift.pair(PairSource(source)), 1, trail)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::index": (take_rows,),
    "aten::index_select": (take_index,),
    "aten::gather": (gather_rows,),
}
