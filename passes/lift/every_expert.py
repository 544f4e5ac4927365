"""Rules of separate experts that all see every token, as first versions of a layer are often written.

out = out + column of expert e * expert_e(x)        a sum over all experts, weights 0 off the ids
stack([expert(x) for expert in experts], dim=1)     every token for every expert, (T, E, D)
stacked.gather(1, ids spread over the width)        the pairs' rows

Nothing says of `expert_e(x)` alone that it is an expert's: any linear layer looks like it. So its meaning is
read once all of them meet: walking back from the E values at once, where they have the same operators, until
they are one value, which is what the experts read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import Size, dtype, is_tensor, same_size, shape, value
from dsmoe_compiler.passes.lift.discover import selected_from
from dsmoe_compiler.passes.lift.reroll import reroll
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven, argument, has_slots, operator_name
from dsmoe_compiler.passes.lift.values import (
    Column,
    Combined,
    DenseSum,
    DenseVisit,
    Everywhere,
    Filled,
    OneExpert,
    Pairs,
    Rows,
    Value,
    Visit,
)


def weigh(lift: Lift, node: Node) -> Value | None:
    """column of expert e (T, 1) * what expert e gives for every token (T, D)."""
    for weight_at, value_at in ((0, 1), (1, 0)):
        weight, rows = lift.of(node.args[weight_at]), node.args[value_at]
        if not isinstance(weight, Column) or weight.trail != (1,) or not weight.zero:
            continue
        if not isinstance(rows, Node) or not lift.opaque(rows) or len(shape(rows)) < 2:
            continue
        if not _same(shape(node.args[weight_at]), (*shape(rows)[:-1], 1)):  # type: ignore[arg-type]
            continue
        width = shape(node)[-1]
        same = all(map(same_size, shape(rows), shape(node))) and dtype(rows) == dtype(node)
        if not same or not isinstance(width, int) or rows.op != "call_function":
            continue
        own = weight.domain
        visit = DenseVisit(own.expert, weight.term, rows)
        lift.visited.setdefault(own.ids, set()).add(own.expert)
        return DenseSum(own.ids, own.slots, (visit,), width)
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
        if other == 0 or (isinstance(found, Filled) and found.number == 0):
            return so_far
        if not isinstance(other, Node) or dtype(other) != dtype(node):
            return None
        if isinstance(found, DenseSum):
            if found.ids is not so_far.ids or (found.base is not None and so_far.base is not None):
                return None
            visits = (*so_far.visits, *found.visits)
            if len({v.expert for v in visits}) != len(visits):
                raise Unproven("R307", "an expert's rows are added twice")
            return replace(so_far, visits=visits, base=so_far.base or found.base)
        unfinished = len(so_far.visits) < (selected_from(so_far.ids) or 0)
        fits = is_tensor(other) and _same(shape(other), shape(node)) and lift.opaque(other)
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
    term = same_experts(lift, [(v.expert, v.rows) for v in visits])
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
    width = shape(node)[-1]
    if not isinstance(width, int) or any(lift.of(p) is not None or p.op != "call_function" for p in parts):
        return None
    term = same_experts(lift, list(enumerate(parts)))
    return None if term is None else Rows(Everywhere(len(parts), dim % rank), term, rank - 1, (width,))


def same_experts(lift: Lift, found: Sequence[tuple[int, Node]]) -> int | None:
    """The term of any expert, from what each of them gives for every token; None if it is no such thing.

    Raises Unproven where they do not compute the same.
    """
    between = _between(lift, [node for _, node in found])
    if between is None:
        return None
    source, steps = between
    visits, known = list[Visit](), len(lift.losses)
    for (e, _), own in zip(found, steps, strict=True):
        *lead, width = shape(source)
        assert isinstance(width, int)
        every = OneExpert(source, 1, e, "every token")
        rows = lift.supposing(source, Rows(every, lift.token(source), len(lead), (width,)), own)
        if not isinstance(rows, Rows) or (rows.domain, rows.lead) != (every, len(lead)):
            del lift.losses[known:]
            return None
        visits.append(Visit(e, rows.term))
    del lift.losses[known:]
    return reroll(lift, 1, visits)


def _between(lift: Lift, results: Sequence[Node]) -> tuple[Node, list[list[Node]]] | None:
    """(the one value that all results are computed from, what lies between, for each); None if there is no
    such value.
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
    sources = [n for n in common if is_tensor(n)]
    if len(sources) != 1 or len(shape(sources[0])) < 2 or not isinstance(shape(sources[0])[-1], int):
        return None
    return sources[0], [[step[i] for step in order] for i in range(len(results))]


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
    if root is None or not has_slots(root[0]) or not _same(shape(root[0]), shape(ids)):
        return None
    return Rows(Pairs(*root), rows.term, rows.lead, rows.trail) if shape(index)[-1] == rows.width else None


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


def _same(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::mul": (weigh,),
    "aten::add": (add,),
    "aten::stack": (stack,),
    "aten::gather": (gather,),
}
