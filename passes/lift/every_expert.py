"""Rules of separate experts that all see every token, as first versions of a layer are often written.

out = out + column of expert e * expert_e(x)        a sum over all experts, weights 0 off the ids
stack([expert(x) for expert in experts], dim=1)     every token for every expert, (T, E, D)
stacked.gather(1, ids spread over the width)        the pairs' rows
stacked[arange(T)[:, None], ids]                    the same
where(mask of expert e, expert(x), 0)               a sum over all experts, too

Nothing says of `expert_e(x)` alone that it is an expert's: any linear layer looks like it. So its meaning is
read once all of them meet: walking back from the E values at once, where they have the same operators, until
they are one value, which is what the experts read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import dtype, is_tensor, same_size, same_sizes, shape, value
from dsmoe_compiler.passes.lift.discover import selected_from
from dsmoe_compiler.passes.lift.masks import listed, listing
from dsmoe_compiler.passes.lift.reroll import reroll
from dsmoe_compiler.passes.lift.state import (
    Lift,
    PairSource,
    Rule,
    Unproven,
    argument,
    has_slots,
    operator_name,
)
from dsmoe_compiler.passes.lift.values import (
    Column,
    Combined,
    DenseSum,
    DenseVisit,
    Everywhere,
    Filled,
    Mask,
    OneExpert,
    Pairs,
    Range,
    Rows,
    Value,
    Visit,
)


def weigh(lift: Lift, node: Node) -> Value | None:
    """column of expert e (T, 1) * what expert e gives for every token (T, D)."""
    for weight_at, value_at in ((0, 1), (1, 0)):
        weight = _column(lift, node.args[weight_at])
        if weight is not None and weight.trail == (1,) and weight.zero:
            return _visited(lift, node, weight, node.args[weight_at], node.args[value_at])
    return None


def _column(lift: Lift, node: object) -> Column | None:
    """One expert's weights of tokens; of a mask over tokens, 1 where the token chose it, else 0."""
    found = lift.of(node)
    if not isinstance(found, Mask) or found.slot is not None or listing(found) != "T":
        return found if isinstance(found, Column) else None
    domain, ones = listed(found), found.axes[len(found.axes.rstrip("1")) :]
    one = lift.terms.number("const", (), (1,))
    return Column(domain, one, (1,) * len(ones), zero=True) if domain is not None else None


def _visited(lift: Lift, node: Node, weight: Column, at: object, rows: object) -> DenseSum | None:
    if not isinstance(rows, Node) or not lift.opaque(rows) or len(shape(rows)) < 2:
        return None
    width = shape(node)[-1]
    same = same_sizes(shape(rows), shape(node)) and same_sizes(shape(at), (*shape(rows)[:-1], 1))  # type: ignore[arg-type]
    if not same or dtype(rows) != dtype(node) or not isinstance(width, int) or rows.op != "call_function":
        return None
    own = weight.domain
    lift.visited.setdefault(own.ids, set()).add(own.expert)
    return DenseSum(own.ids, own.slots, (DenseVisit(own.expert, weight.term, rows),), width)


def choose(lift: Lift, node: Node) -> Value | None:
    """where(mask of expert e (T, 1), what it gives for every token, 0 or what other experts gave)."""
    if len(node.args) != 3:
        return None
    mask, rows, other = node.args
    weight, so_far, found = _column(lift, mask), lift.of(rows), lift.of(other)
    if weight is None or weight.trail != (1,) or not isinstance(lift.of(mask), Mask):
        return None
    if isinstance(so_far, DenseSum):
        return _chosen(so_far, weight, found, isinstance(other, Node) and other in _added_to(rows))
    zero = other == 0 or (isinstance(found, Filled) and found.number == 0)
    return _visited(lift, node, weight, mask, rows) if zero else None


def _chosen(so_far: DenseSum, mask: Column, other: Value | None, continued: bool) -> DenseSum | None:
    """A sum to which one expert's rows were added last, where the token chose it, else as it was before.

    Those rows are 0 where the token did not choose the expert, so both are the sum.
    """
    last = so_far.visits[-1]
    if (so_far.ids, last.expert) != (mask.domain.ids, mask.domain.expert):
        return None
    if isinstance(other, DenseSum):
        before = replace(so_far, visits=so_far.visits[:-1])
        return so_far if continued and other == before else None
    zero = isinstance(other, Filled) and other.number == 0
    return so_far if zero and len(so_far.visits) == 1 and so_far.base is None else None


def _added_to(node: object) -> tuple[Node, ...]:
    return (
        tuple(node.all_input_nodes) if isinstance(node, Node) and operator_name(node) == "aten::add" else ()
    )


def scale(lift: Lift, node: Node) -> Value | None:
    """A sum over experts times one number a token, where each token has one id: that is its weight."""
    for sum_at, weight_at in ((0, 1), (1, 0)):
        so_far, weight, added = lift.of(node.args[sum_at]), node.args[weight_at], node.args[sum_at]
        if not isinstance(so_far, DenseSum) or so_far.slots != 1 or so_far.base is not None:
            continue
        assert isinstance(added, Node)
        if not is_tensor(weight) or not lift.opaque(weight) or dtype(node) != dtype(added):
            continue
        assert isinstance(weight, Node)
        if not same_sizes(shape(node), shape(added)) or not same_sizes(
            shape(weight), (*shape(added)[:-1], 1)
        ):
            continue
        if not value(weight).is_floating_point():
            continue
        pair = lift.pair(PairSource(weight))
        visits = [replace(v, weight=lift.terms.number("mul", (v.weight, pair))) for v in so_far.visits]
        return replace(so_far, visits=tuple(visits))
    return None


def add(lift: Lift, node: Node) -> Value | None:
    """Such products added to each other, to zeros, or to what is not of the layer."""
    if argument(node, "alpha", 1) != 1:
        return None
    for one_at, other_at in ((0, 1), (1, 0)):
        so_far, other = lift.of(node.args[one_at]), node.args[other_at]
        if not isinstance(so_far, DenseSum):
            continue
        found = lift.of(other)
        if other == 0:
            return so_far
        if any(not is_tensor(a) or dtype(a) != dtype(node) for a in node.args[:2]):  # type: ignore[arg-type]
            return None
        assert isinstance(other, Node)
        if isinstance(found, Filled) and found.number == 0 and same_sizes(shape(other), shape(node)):
            return so_far
        if isinstance(found, DenseSum):
            if found.ids is not so_far.ids or (found.base is not None and so_far.base is not None):
                return None
            visits = (*so_far.visits, *found.visits)
            if len({v.expert for v in visits}) != len(visits):
                raise Unproven("R307", "an expert's rows are added twice")
            return replace(so_far, visits=visits, base=so_far.base or found.base)
        unfinished = len(so_far.visits) < (selected_from(so_far.ids) or 0)
        fits = is_tensor(other) and same_sizes(shape(other), shape(node)) and lift.opaque(other)
        if fits and unfinished and so_far.base is None:
            return replace(so_far, base=other)
    return None


def finished(lift: Lift, found: DenseSum) -> Combined:
    """What the sum means where nothing more is added. Raises Unproven where the experts differ."""
    visits = sorted(found.visits, key=lambda v: v.expert)
    weights = {v.weight for v in visits}
    if len(weights) != 1:
        raise Unproven("R308", "the experts' rows are weighed by different weights")
    if _between(lift, [v.rows for v in visits]) is None:
        raise Unproven("R303", "the experts do not apply the same operators to one value")
    term = same_experts(lift, [(v.expert, v.rows) for v in visits], found.ids)
    if term is None:
        raise Unproven("R301", "what the experts compute leaves the known term language")
    weighed = lift.terms.number("mul", (term, weights.pop()))
    rows = Rows(Pairs(found.ids, found.slots), weighed, 1, (found.width,))
    experts = len(visits)
    return Combined(rows, found.base, None if selected_from(found.ids) == experts else experts)


def stack(lift: Lift, node: Node) -> Value | None:
    """stack([expert(x) for expert in experts])."""
    parts, dim = argument(node, "tensors"), argument(node, "dim")
    rank = len(shape(node))
    if dim % rank == rank - 1 or len(parts) < 2 or rank < 3 or not value(node).is_floating_point():
        return None
    return _every(lift, node, parts, dim % rank, rank - 1)


def concatenate(lift: Lift, node: Node) -> Value | None:
    """cat([expert(x).unsqueeze(1) for expert in experts], dim=1)."""
    parts, rank = argument(node, "tensors"), len(shape(node))
    dim = argument(node, "dim") % rank
    columns = all(operator_name(p) == "aten::unsqueeze" and argument(p, "dim") % rank == dim for p in parts)
    if not columns or len(parts) < 2 or dim == rank - 1 or not value(node).is_floating_point():
        return None
    return _every(lift, node, [p.args[0] for p in parts], dim, rank - 1)


def _every(lift: Lift, node: Node, parts: Sequence[Node], axis: int, lead: int) -> Rows | None:
    width = shape(node)[-1]
    if not isinstance(width, int) or any(lift.of(p) is not None or p.op != "call_function" for p in parts):
        return None
    term = same_experts(lift, list(enumerate(parts)))
    return None if term is None else Rows(Everywhere(len(parts), axis), term, lead, (width,))


def same_experts(lift: Lift, found: Sequence[tuple[int, Node]], ids: Node | None = None) -> int | None:
    """The term of any expert, from what each of them gives for every token; None if it is no such thing.

    They read one value, and a number a token where each token has one of the `ids`. Raises Unproven where
    they do not compute the same.
    """
    between = _between(lift, [node for _, node in found])
    if between is None:
        return None
    (source, *numbers), steps = between
    *lead, width = shape(source)
    if not isinstance(width, int) or (
        numbers and (ids is None or not _are_weights(lift, numbers, source, ids))
    ):
        return None
    visits, known = list[Visit](), len(lift.losses)
    before = {n: lift.meaning.get(n) for n in numbers}
    for (e, _), own in zip(found, steps, strict=True):
        every = OneExpert(source, 1, e, "every token")
        for n in numbers:
            trail = (1,) * (len(shape(n)) - len(lead))
            lift.meaning[n] = Rows(every, lift.pair(PairSource(n)), len(lead), trail)
        rows = lift.supposing(source, Rows(every, lift.token(source), len(lead), (width,)), own)
        for n, old in before.items():
            lift.meaning.pop(n) if old is None else lift.meaning.update({n: old})
        if not isinstance(rows, Rows) or (rows.domain, rows.lead) != (every, len(lead)):
            del lift.losses[known:]
            return None
        visits.append(Visit(e, rows.term))
    del lift.losses[known:]
    return reroll(lift, 1, visits)


def _are_weights(lift: Lift, numbers: Sequence[Node], source: Node, ids: Node) -> bool:
    """Whether values hold one number for each row of `source`, each row having one of the ids."""
    lead = shape(source)[:-1]
    root = lift.ids_root(ids)
    if root is None or root[1] != 1:
        return False
    return all(
        value(n).is_floating_point()
        and lift.opaque(n)
        and (same_sizes(shape(n), lead) or same_sizes(shape(n), (*lead, 1)))
        for n in numbers
    )


def _between(lift: Lift, results: Sequence[Node]) -> tuple[list[Node], list[list[Node]]] | None:
    """(the values that all results are computed from, the widest first; what lies between, for each); None if
    the results are computed differently.
    """
    common, order, seen = set[Node](), list[tuple[Node, ...]](), set[tuple[Node, ...]]()
    stack = [(tuple(results), False)]
    while stack:
        at, visited = stack.pop()
        if visited:
            order.append(at)
            continue
        if at in seen:
            continue
        seen.add(at)
        tensors = [lift.graph.parameter(n) is not None for n in at]
        if all(tensors):
            continue
        if len(set(at)) == 1:
            common.add(at[0])
            continue
        if any(n.op != "call_function" or n.target != at[0].target for n in at):
            return None
        operands = [n.all_input_nodes for n in at]
        if len({len(o) for o in operands}) != 1:
            return None
        stack.append((at, True))
        stack.extend((t, False) for t in zip(*operands, strict=True))
    sources = sorted((n for n in common if is_tensor(n)), key=_widest)
    if not sources or len(shape(sources[0])) < 2:
        return None
    return sources, [[step[i] for step in order] for i in range(len(results))]


def _widest(node: Node) -> tuple[bool, int, str]:
    sizes = shape(node)
    return not sizes or same_size(sizes[-1], 1), -len(sizes), node.name


def gather(lift: Lift, node: Node) -> Value | None:
    """stacked (T, E, D).gather(1, ids (T, K) spread over the width)."""
    rows, index = lift.rows(node.args[0]), argument(node, "index")
    if rows is None or not isinstance(rows.domain, Everywhere) or rows.domain.axis != rows.lead - 1:
        return None
    ids = _spread(index)
    dim = argument(node, "dim") % (rows.lead + 1)
    if dim != rows.domain.axis or len(rows.trail) != 1 or ids is None or len(shape(ids)) != rows.lead:
        return None
    root = lift.ids_root(ids)
    if root is None or not has_slots(root[0]) or not same_sizes(shape(root[0]), shape(ids)):
        return None
    return Rows(Pairs(*root), rows.term, rows.lead, rows.trail) if shape(index)[-1] == rows.width else None


def index(lift: Lift, node: Node) -> Value | None:
    """stacked (T, E, D)[arange(T)[:, None], ids (T, K)], stacked (E, T, D)[ids, arange(T)[:, None]]."""
    rows, indices = lift.rows(node.args[0]), argument(node, "indices")
    if rows is None or not isinstance(rows.domain, Everywhere) or (rows.lead, len(indices)) != (2, 2):
        return None
    ids, numbers = indices[rows.domain.axis], indices[1 - rows.domain.axis]
    if not isinstance(ids, Node) or not isinstance(numbers, Node) or (root := lift.ids_root(ids)) is None:
        return None
    if not same_sizes(shape(root[0]), shape(ids)) or not _numbers_tokens(lift, numbers, ids):
        return None
    if has_slots(ids) != (len(shape(ids)) == 2):
        return None
    return Rows(Pairs(*root), rows.term, len(shape(ids)), rows.trail)


def _numbers_tokens(lift: Lift, numbers: Node, ids: Node) -> bool:
    """Whether a value is 0, 1, … for the tokens: (T, 1) beside ids (T, K), (T,) beside (T,)."""
    if len(shape(ids)) == 2 and operator_name(numbers) in ("aten::unsqueeze", "aten::view", "aten::reshape"):
        if not same_sizes(shape(numbers), (*shape(ids)[:1], 1)):
            return False
        below = numbers.args[0]
        assert isinstance(below, Node)
        numbers = below
    return isinstance(lift.of(numbers), Range) and same_sizes(shape(numbers), shape(ids)[:1])


def _spread(node: Node) -> Node | None:
    """The (T, K) value under ids.unsqueeze(-1).expand(-1, -1, D)."""
    if operator_name(node) not in ("aten::expand", "aten::repeat", "aten::expand_as"):
        return None
    column = node.args[0]
    assert isinstance(column, Node)
    rank = len(shape(column))
    if operator_name(column) != "aten::unsqueeze" or argument(column, "dim") not in (rank - 1, -1):
        return None
    below = column.args[0]
    same = all(map(same_size, shape(node)[: rank - 1], shape(column)[: rank - 1]))
    return below if isinstance(below, Node) and same and len(shape(node)) == rank else None


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::mul": (weigh, scale),
    "aten::where": (choose,),
    "aten::add": (add,),
    "aten::stack": (stack,),
    "aten::cat": (concatenate,),
    "aten::gather": (gather,),
    "aten::index": (index,),
}
