"""Put the op where a combine stands: its operands as the op takes them, its result as the model reads it.

x (T, D), ids (T, K) with −1 where a pair is dropped, weights (T, K), the experts' tensors, the spec
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node
from torch.fx.node import Argument

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import Step
from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    Size,
    aten,
    depends_on_data,
    dtype,
    same_size,
    shape,
    value,
)
from dsmoe_compiler.ir.spec import DTYPES, ExpertsSpec, to_text
from dsmoe_compiler.passes.lift import combine
from dsmoe_compiler.passes.lift.axes import count_tokens
from dsmoe_compiler.passes.lift.ranges import inside, never_negative
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Unproven, has_slots, row_base
from dsmoe_compiler.passes.lift.tensors import ExpertsTensor, emit, experts_tensors
from dsmoe_compiler.passes.lift.values import Combined, Everywhere, Group, Offsets
from dsmoe_compiler.passes.region import size_arguments

_FLOATS = frozenset(getattr(torch, name) for name in DTYPES)


@dataclass(frozen=True)
class Inserted:
    """The op that stands where a combine stood: `new` for `old`, both computed from `inputs`.

    Numbers of those in `nonnegative` are not below 0, ids are below `choices`.
    """

    old: Node
    new: Node
    op: Node
    inputs: tuple[Node, ...]
    spec: ExpertsSpec
    slots: int
    nonnegative: tuple[Node, ...]
    choices: int


def insert(lift: Lift, node: Node, found: Combined, ids: Node, standing: dict[Node, Node]) -> Inserted:
    """Put `dsmoe::experts` where the combine stands; `standing` says what stands for earlier combines.

    Raises Unproven when the finished term does not fit the op.
    """
    terms, term = lift.terms, found.rows.term
    tokens, pairs = terms.leaves(term, "token"), sources_of(lift, found)
    params = experts_tensors(lift, term)
    counts = {found.visited} if found.beside else {p.count for p in params.values()} - {None}
    if len(tokens) != 1:
        raise Unproven("R303", f"the experts read {len(tokens)} different inputs")
    if len(pairs) > 1:
        raise Unproven("R309", f"{len(pairs)} different routing weights meet in one layer")
    for group in found.beside:
        read = terms.leaves(group.term, "token"), terms.leaves(group.term, "pair")
        if read[0] != tokens or read[1] not in ([], terms.leaves(term, "pair")):
            raise Unproven("R308", f"expert {group.first} reads something else than expert 0")
    if isinstance(found.rows.domain, Everywhere):
        combine.require_sparse(lift, term)
    if len(counts) != 1:
        raise Unproven("R302", "the layer's weights are not all indexed by the same experts")
    x = lift.tokens[str(tokens[0].attrs[0])]
    x = standing.get(x, x)
    pairs = [
        replace(p, node=standing.get(p.node, p.node), made_of=_standing(p.made_of, standing)) for p in pairs
    ]
    found = replace(found, base=_standing(found.base, standing))
    experts, hidden, slots = counts.pop(), shape(x)[-1], shape(ids)[-1] if has_slots(ids) else 1
    assert isinstance(experts, int) and isinstance(hidden, int) and isinstance(slots, int)
    tokens_of_ids, added = count_tokens(ids), _rows(node)
    if not same_size(_rows(x), tokens_of_ids):
        because = f"the experts read {_rows(x)} rows where the ids are those of {tokens_of_ids} tokens"
        raise Unproven("R303", because)
    if not same_size(added, tokens_of_ids) and not depends_on_data(added):
        because = f"the experts' rows are added to {added} rows, the ids are those of {tokens_of_ids} tokens"
        raise Unproven("R303", because)
    old = _through_cast(node) if found.base is None else node
    rename = {tokens[0]: Step("x")}
    rename |= {s: Step("w") for s in terms.leaves(term, "pair")}
    rename |= {s: Step("p", (), (i,)) for i, s in enumerate(params)}
    out = str(dtype(old)).removeprefix("torch.") if old is not node else None
    spec = ExpertsSpec(experts, hidden, terms.body(term, rename), out)
    return _emit(lift, node, old, x, ids, pairs, list(params.values()), spec, slots, found)


def sources_of(lift: Lift, found: Combined) -> list[PairSource]:
    """Where the routing weights of a combine come from."""
    return [lift.sources[str(s.attrs[0])] for s in lift.terms.leaves(found.rows.term, "pair")]


def _counted(lift: Lift, node: Node, found: Combined) -> int | None:
    """How many experts have rows at all, where the spelling leaves out the pairs of others."""
    if isinstance(found.rows.domain, Everywhere):
        return found.rows.domain.experts
    counted = (m.experts for n in behind(lift, node) if isinstance(m := lift.of(n), Offsets))
    return next(counted, None) if found.visited is None else found.visited


def behind(lift: Lift, node: Node) -> set[Node]:
    """The values with a meaning that lead to a combine."""
    stack, seen = [node], set[Node]()
    while stack:
        at = stack.pop()
        if at not in seen and at in lift.meaning:
            seen.add(at)
            stack.extend(at.all_input_nodes)
    return seen


def _standing(node: Node | None, standing: dict[Node, Node]) -> Node | None:
    return node if node is None else standing.get(node, node)


def _rows(node: Node) -> Size:
    """How many rows a value has: the product of its sizes without the width, the last that is not 1."""
    sizes = list(shape(node))
    while len(sizes) > 2 and same_size(sizes[-1], 1):
        sizes.pop()
    return math.prod(sizes[:-1])


def _emit(
    lift: Lift,
    node: Node,
    old: Node,
    x: Node,
    ids: Node,
    pairs: list[PairSource],
    params: list[ExpertsTensor],
    spec: ExpertsSpec,
    slots: int,
    found: Combined,
) -> Inserted:
    graph = lift.graph.graph
    with graph.inserting_before(node):
        (sizes, read), tokens, x_TD = _sizes_like(lift, node, x), count_tokens(ids), _as_rows(lift, x)
        ids_TK, chosen = _as_pairs(lift, ids, tokens, slots)
        experts = ids_TK
        if (counted := _counted(lift, node, found)) is not None:
            if not inside(lift.graph, ids, counted):
                experts = _dropped_outside(lift, ids_TK, 0, counted)
        elif not never_negative(lift.graph, ids):
            experts = _wrapped(lift, ids_TK, spec.count)
        weights, weighed = _weights(lift, pairs, ids, ids_TK, tokens, slots, x_TD)
        tensors = [emit(lift, p, spec.count, node) for p in params]
        new = graph.call_function(ops.EXPERTS, (x_TD, experts, weights, tensors, to_text(spec)))
        new.meta = {k: v for k, v in old.meta.items() if k != "tensor_meta"}
        if len(sizes) != 2:
            new.meta["val"] = value(old).reshape(tokens, found.rows.width)
        out = new
        for group in found.beside:
            out = _with_group(lift, out, group, x_TD, ids_TK, weights, spec)
        if len(sizes) != 2:
            out = graph.call_function(aten.reshape.default, (out, sizes))
            out.meta = dict(old.meta)
        if found.base is not None:
            out = graph.call_function(aten.add.Tensor, (out, found.base))
            out.meta = dict(old.meta)
    inputs = tuple(r for n in (read, chosen, weighed, found.base) if n is not None for r in _roots(lift, n))
    signs = tuple(r for n in found.nonnegative for r in _roots(lift, n))
    choices = max([spec.count, *(group.stop for group in found.beside)])
    return Inserted(old, out, new, inputs, spec, slots, signs, choices)


def _with_group(
    lift: Lift, so_far: Node, group: Group, x_TD: Node, ids_TK: Node, weights: Node, routed: ExpertsSpec
) -> Node:
    """A sum with what experts without tensors add: they are all one, that all of their ids choose."""
    graph, terms = lift.graph.graph, lift.terms
    leaves = {leaf: Step("x") for leaf in terms.leaves(group.term, "token")}
    leaves |= {leaf: Step("w") for leaf in terms.leaves(group.term, "pair")}
    spec = ExpertsSpec(1, routed.hidden, terms.body(group.term, leaves), routed.out_dtype)
    dropped = _dropped_outside(lift, ids_TK, group.first, group.stop)
    chosen = graph.call_function(aten.clamp_max.default, (dropped, 0))
    chosen.meta = dict(dropped.meta)
    added = graph.call_function(ops.EXPERTS, (x_TD, chosen, weights, [], to_text(spec)))
    out = graph.call_function(aten.add.Tensor, (so_far, added))
    added.meta, out.meta = dict(so_far.meta), dict(so_far.meta)
    return out


def _roots(lift: Lift, node: Node) -> list[Node]:
    """The model's own values that a value which the walk put into the graph was made of."""
    if node not in lift.made:
        return [node]
    return list(dict.fromkeys(root for of in lift.made[node] for root in _roots(lift, of)))


def _sizes_like(lift: Lift, node: Node, x: Node) -> tuple[Sequence[int | Node], Node]:
    """A reshape's arguments for the sizes of a combine, and x, or what it is a view of if that gave them.

    Raises Unproven where the graph does not hold them.
    """
    if (known := size_arguments(lift.graph, node)) is not None:
        return known, x
    like = row_base(x)
    held = {str(size): i for i, size in enumerate(shape(like)) if not isinstance(size, int)}
    sizes = shape(node)
    if any(not isinstance(size, int) and str(size) not in held for size in sizes):
        raise Unproven("R407", f"more than one size of %{node.name} is held by no value of the graph")
    return [size if isinstance(size, int) else _size(lift, like, held[str(size)]) for size in sizes], like


def _size(lift: Lift, x: Node, dim: int) -> Node:
    size = lift.graph.graph.call_function(aten.sym_size.int, (x, dim))
    size.meta = {**x.meta, "val": shape(x)[dim]}
    return size


def _as_rows(lift: Lift, x: Node) -> Node:
    """x as (T, D), reshaped only if it is not."""
    if len(shape(x)) == 2:
        return x
    made = lift.graph.graph.call_function(aten.reshape.default, (x, [-1, shape(x)[-1]]))
    made.meta = {**x.meta, "val": value(x).reshape(_rows(x), shape(x)[-1])}
    return made


def _dropped_outside(lift: Lift, ids_TK: Node, first: int, stop: int) -> Node:
    """Ids that none of these experts answers to as the op's −1; the others as they are."""
    graph = lift.graph.graph

    def call(op: torch._ops.OpOverload, *args: Argument, like: torch.dtype) -> Node:
        made = graph.call_function(op, args)
        made.meta = {**ids_TK.meta, "val": value(ids_TK).to(like)}
        return made

    low = call(aten.ge.Scalar, ids_TK, first, like=torch.bool)
    high = call(aten.lt.Scalar, ids_TK, stop, like=torch.bool)
    inside = call(aten.logical_and.default, low, high, like=torch.bool)
    return call(aten.where.ScalarOther, inside, ids_TK, -1, like=dtype(ids_TK))


def _wrapped(lift: Lift, ids_TK: Node, experts: int) -> Node:
    """Ids that may be negative, which the model's own index counts from the end and the op would drop."""
    wrapped = lift.graph.graph.call_function(aten.remainder.Scalar, (ids_TK, experts))
    wrapped.meta = dict(ids_TK.meta)
    return wrapped


def _weights(
    lift: Lift, pairs: list[PairSource], ids: Node, ids_TK: Node, tokens: Size, slots: int, x: Node
) -> tuple[Node, Node | None]:
    """(weights (T, K), the value they are made from; None where every pair weighs 1).

    A pair whose id is no expert has any weight: it is dropped.
    """
    graph = lift.graph.graph
    if not pairs:
        weights = graph.call_function(aten.ones_like.default, (ids_TK,), {"dtype": dtype(x)})
        weights.meta = {**ids_TK.meta, "val": value(ids_TK).to(dtype(x))}
        return weights, None
    (pair,) = pairs
    if not pair.matrix:
        return _as_pairs(lift, pair.node, tokens, slots)
    matrix, at = _as_rows(lift, pair.node), ids_TK
    if not inside(lift.graph, ids, int(shape(matrix)[1])):
        at = graph.call_function(aten.clamp.default, (ids_TK, 0, int(shape(matrix)[1]) - 1))
        at.meta = dict(ids_TK.meta)
    gathered = graph.call_function(aten.gather.default, (matrix, 1, at))
    gathered.meta = {**pair.node.meta, "val": value(ids_TK).to(dtype(pair.node))}
    return gathered, None if pair.mask else pair.made_of or pair.node


def _as_pairs(lift: Lift, node: Node, tokens: Size, slots: int) -> tuple[Node, Node]:
    """(the node as (T, K), reshaped only if nothing it is a view of already is; what it is made from)."""
    at = node
    while True:
        sizes = shape(at)
        if len(sizes) == 2 and same_size(sizes[0], tokens) and same_size(sizes[1], slots):
            return at, at
        below = at.args[0] if at.args else None
        if at.target not in VIEWS | COPIES | {aten.unsqueeze.default} or not isinstance(below, Node):
            break
        at = below
    made = lift.graph.graph.call_function(aten.reshape.default, (at, [-1, slots]))
    made.meta = {**at.meta, "val": value(at).reshape(tokens, slots)}
    return made, at


def _through_cast(node: Node) -> Node:
    """The combine, or the cast that is all anybody reads of it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in CASTS and dtype(users[0]) in _FLOATS:
        return users[0]
    return node
