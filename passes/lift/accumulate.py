"""Rules by which a loop over experts puts its rows together.

out.index_add(0, tokens, rows)            each expert's rows added to its tokens
out[tokens] += rows                       the same, read, added and written back
y[mask] = rows, y[pairs] = rows           each expert's rows written to its pairs
cat([rows of expert 0, rows of 1, …])     the sorted pairs again
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import dtype, is_tensor, same_size, same_sizes, shape, value
from dsmoe_compiler.passes.lift import every_expert
from dsmoe_compiler.passes.lift.coordinates import Located, located
from dsmoe_compiler.passes.lift.discover import require_distinct, selected_from
from dsmoe_compiler.passes.lift.reroll import reroll, reroll_apart
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Combined,
    DenseSum,
    Domain,
    Filled,
    Mask,
    OneExpert,
    Pairs,
    PartialRows,
    PartialSum,
    Rows,
    Spread,
    TokenOf,
    Value,
    Visit,
)


def index_add(lift: Lift, node: Node) -> Value | None:
    """out.index_add(0, tokens of one expert, its rows)."""
    at = lift.of(node.args[2])
    if not isinstance(at, TokenOf) or not isinstance(at.domain, OneExpert):
        return None
    if argument(node, "dim") != 0 or argument(node, "alpha") != 1 or len(shape(node)) != 2:
        return None
    return _added(lift, node, at.domain, lift.rows(node.args[3]), node.args[3])


def scatter_add(lift: Lift, node: Node) -> Value | None:
    """out.scatter_add(0, tokens spread over the width, rows), scatter_reduce(…, "sum")."""
    at, source = lift.of(argument(node, "index")), argument(node, "src")
    if not isinstance(at, Spread) or not isinstance(at.at, TokenOf) or argument(node, "dim") != 0:
        return None
    reduces = operator_name(node) == "aten::scatter_reduce"
    if reduces and (argument(node, "reduce") != "sum" or not argument(node, "include_self")):
        return None
    rows = lift.rows(source)
    if rows is None or at.width != rows.width or not isinstance(at.at.domain, OneExpert):
        return None
    if len(shape(node)) != 2:
        return None
    return _added(lift, node, at.at.domain, rows, source)


def index_put(lift: Lift, node: Node) -> Value | None:
    """out[tokens] = out[tokens] + rows, out[tokens] += rows by accumulation, y[pairs] = rows."""
    indices, written = argument(node, "indices"), node.args[2]
    rows = lift.rows(written)
    if rows is None or not isinstance(rows.domain, OneExpert):
        return None
    target = node.args[0]
    assert isinstance(target, Node)
    at = located(lift, indices, target)
    if at is None or at.domain != rows.domain:
        _require_own(lift, indices, rows.domain)
        return None
    if rows.domain.slots > 1 and not at.pairs:
        lift.visited.setdefault(rows.domain.ids, set()).add(rows.domain.expert)
    if at.pairs:
        return None if argument(node, "accumulate") else _written(lift, node, rows, at)
    if len(shape(node)) != at.rank + 1:
        return None
    if argument(node, "accumulate"):
        return _added(lift, node, rows.domain, rows, written)
    if rows.domain.slot is None:
        require_distinct(rows.domain.ids)
    rest = _without(lift, rows, node.args[0])
    if rest is not None:
        return _added(lift, node, rows.domain, rest, written)
    so_far = lift.of(node.args[0])
    if rows.domain.slots == 1:
        return _written(lift, node, rows, at)
    if _holds_zeros(so_far, rows.domain):
        return _added(lift, node, rows.domain, rows, written)
    raise Unproven("R407", f"{rows.domain.words} replace what their tokens held, instead of adding to it")


def _holds_zeros(so_far: Value | None, domain: OneExpert) -> bool:
    """Whether the tokens of some rows hold 0 so far: zeros, or rows of other experts in the same slot."""
    if isinstance(so_far, PartialSum) and so_far.ids is domain.ids and so_far.base is None:
        return domain.slot is not None and all(v.slot == domain.slot for v in so_far.visits)
    return isinstance(so_far, Filled) and so_far.number == 0


def _require_own(lift: Lift, indices: list[Node], domain: OneExpert) -> None:
    for index in indices:
        found = lift.of(index)
        at = getattr(found, "domain", found)
        if isinstance(at, (OneExpert, Mask)) and (at.ids, at.expert) != (domain.ids, domain.expert):
            raise Unproven("R402", f"{domain.words} are put where those of expert {at.expert} belong")


def index_copy(lift: Lift, node: Node) -> Value | None:
    """out.index_copy(0, tokens, rows)."""
    tokens, target = argument(node, "index"), node.args[0]
    assert isinstance(target, Node)
    at = located(lift, [tokens], target) if argument(node, "dim") == 0 else None
    return _replaced(lift, node, at, argument(node, "source"))


def masked_scatter(lift: Lift, node: Node) -> Value | None:
    """out.masked_scatter(mask (T, 1), rows): the rows in the order of the mask's tokens."""
    mask = argument(node, "mask")
    if not isinstance(lift.of(mask), Mask) or not same_size(shape(mask)[-1], 1):
        return None
    if not same_sizes(shape(mask)[:-1], shape(node)[:-1]):
        return None
    at = located(lift, [mask], mask)
    at = at and replace(at, sizes=at.sizes[:-1])
    return _replaced(lift, node, at, argument(node, "source"))


def _replaced(lift: Lift, node: Node, at: Located | None, written: Node) -> Value | None:
    """An expert's rows put over zeros, at their tokens."""
    rows, target = lift.rows(written), node.args[0]
    if rows is None or not isinstance(rows.domain, OneExpert) or rows.trail != shape(node)[-1:]:
        return None
    if at is None or at.pairs or at.domain != rows.domain or len(shape(node)) != at.rank + 1:
        return None
    if rows.domain.slot is None:
        require_distinct(rows.domain.ids)
    if rows.domain.slots == 1:
        return _written(lift, node, rows, at)
    return (
        _added(lift, node, rows.domain, rows, written) if _holds_zeros(lift.of(target), rows.domain) else None
    )


def add(lift: Lift, node: Node) -> Value | None:
    """Sums over different experts added to each other, or to what is not of the loop."""
    if argument(node, "alpha", 1) != 1 or len(node.all_input_nodes) != 2:
        return None
    left, right = (a for a in node.args[:2] if isinstance(a, Node))
    a, b = lift.of(left), lift.of(right)
    if not is_tensor(left) or not is_tensor(right):
        return None
    if dtype(left) != dtype(right) or not all(map(same_size, shape(left), shape(right))):
        return None
    if isinstance(a, PartialSum) and isinstance(b, PartialSum):
        if a.ids is not b.ids or (a.base is not None and b.base is not None):
            return None
        return PartialSum(a.ids, a.slots, _joined(a.visits, b.visits), a.width, a.base or b.base)
    for so_far, found, other in ((a, b, right), (b, a, left)):
        if not isinstance(so_far, PartialSum):
            continue
        if isinstance(found, Filled) and found.number == 0:
            return so_far
        unfinished = len(so_far.visits) < (selected_from(so_far.ids) or 0)
        if unfinished and so_far.base is None and lift.opaque(other):
            return replace(so_far, base=other)
    return None


def _joined(before: tuple[Visit, ...], after: tuple[Visit, ...]) -> tuple[Visit, ...]:
    """Raises Unproven where an expert is visited twice."""
    seen = {(v.expert, v.slot) for v in before}
    for visit in after:
        if (visit.expert, visit.slot) in seen or (visit.expert, None) in seen:
            raise Unproven("R307", f"the rows of {visit.words} are added twice")
    return (*before, *after)


def _without(lift: Lift, rows: Rows, start: object) -> Rows | None:
    """`rows` without the value they are added to, which they must hold once."""
    step = lift.terms.steps[rows.term]
    if step.op != "add" or not isinstance(start, Node):
        return None
    held = lift.token(start)
    for mine, other in ((0, 1), (1, 0)):
        if step.args[mine] == held and held not in lift.terms.reachable(step.args[other]):
            return rows.like(step.args[other])
    return None


def _added(lift: Lift, node: Node, domain: OneExpert, rows: Rows | None, written: object) -> Value | None:
    start = node.args[0]
    assert isinstance(start, Node) and isinstance(written, Node)
    if rows is None or rows.lead != 1 or len(rows.trail) != 1:
        return None
    if rows.domain != domain:
        other = "that other ids chose" if _same_but_ids(rows.domain, domain) else f"of {domain.words}"
        raise Unproven("R402", f"{rows.domain.words} are added at the tokens {other}")
    if dtype(written) != dtype(node) or shape(node)[-1] != rows.width:
        return None
    so_far = lift.of(start)
    visit = Visit(domain.expert, rows.term, domain.slot)
    lift.visited.setdefault(domain.ids, set()).add(domain.expert)
    if isinstance(so_far, PartialSum) and so_far.ids is domain.ids:
        return replace(so_far, visits=_joined(so_far.visits, (visit,)))
    if isinstance(so_far, Filled) and so_far.number == 0:
        return PartialSum(domain.ids, domain.slots, (visit,), rows.width)
    if so_far is None or isinstance(so_far, (PartialSum, Combined, Filled)):
        lift.require_unwritten(start)
        return PartialSum(domain.ids, domain.slots, (visit,), rows.width, start)
    return None


def _same_but_ids(rows: Domain, at: OneExpert) -> bool:
    return isinstance(rows, OneExpert) and rows.expert == at.expert and rows.ids is not at.ids


def _written(lift: Lift, node: Node, rows: Rows, at: Located) -> Value | None:
    """An expert's rows in their pairs' places; all pairs, once every expert that can be chosen is there.

    Where a token has one id, its row is its pair: written over zeros, rows are as good as added.
    """
    domain, start = at.domain, lift.of(node.args[0])
    source = _source(node)
    if rows.lead != 1 or len(shape(node)) != at.rank + len(rows.trail) or dtype(source) != dtype(node):
        return None
    if domain.slot is not None:
        return None
    flat, every = at.rank == 1 or at.pairs, selected_from(domain.ids)
    zeros = isinstance(start, Filled) and start.number == 0
    added = isinstance(start, PartialSum) and start.ids is domain.ids and start.base is None
    if not at.pairs and (added or (zeros and (not flat or every is None))):
        return _added(lift, node, domain, rows, source)
    visits: tuple[Visit, ...] = (Visit(domain.expert, rows.term),)
    if isinstance(start, PartialRows):
        if (start.ids, start.trail) != (domain.ids, rows.trail):
            return None
        visits = _joined(start.visits, visits)
    if every != len(visits):
        return PartialRows(domain.ids, domain.slots, visits, rows.trail)
    if not flat:
        lift.visited.setdefault(domain.ids, set()).update(v.expert for v in visits)
        return PartialSum(domain.ids, domain.slots, visits, rows.width) if len(rows.trail) == 1 else None
    if domain.slots == 1 and at.rank == 1:
        lift.written.append(node)
    return Rows(Pairs(domain.ids, domain.slots), reroll(lift, domain.slots, visits), at.rank, rows.trail)


def _source(node: Node) -> Node:
    """What is written."""
    written = argument(node, "values" if operator_name(node) == "aten::index_put" else "source")
    assert isinstance(written, Node)
    return written


def weigh(lift: Lift, node: Node) -> Value | None:
    """A sum over experts times one number a token, where each token has one id: that is its weight."""
    for sum_at, weight_at in ((0, 1), (1, 0)):
        so_far, weight, added = lift.of(node.args[sum_at]), node.args[weight_at], node.args[sum_at]
        if not isinstance(so_far, PartialSum) or so_far.slots != 1 or so_far.base is not None:
            continue
        if not is_tensor(weight) or not lift.opaque(weight) or dtype(node) != dtype(added):  # type: ignore[arg-type]
            continue
        assert isinstance(weight, Node) and isinstance(added, Node)
        if not value(weight).is_floating_point() or not same_sizes(shape(node), shape(added)):
            continue
        if not same_sizes(shape(weight), (*shape(added)[:-1], 1)):
            continue
        pair = lift.pair(PairSource(weight))
        visits = tuple(replace(v, term=lift.terms.number("mul", (v.term, pair))) for v in so_far.visits)
        return replace(so_far, visits=visits)
    return None


def concatenate(lift: Lift, node: Node) -> Value | None:
    """cat of the segments of sorted rows, expert by expert."""
    rows = [lift.rows(a) for a in argument(node, "tensors")]
    if not rows or argument(node, "dim") % len(shape(node)) != 0:
        return None
    first = rows[0]
    if first is None or not isinstance(first.domain, OneExpert) or not isinstance(first.domain.order, Node):
        return None
    own, order = first.domain, first.domain.order
    visits = list[Visit]()
    for e, row in enumerate(rows):
        if row is None or row.domain != OneExpert(own.ids, own.slots, e, order):
            return None
        if (row.lead, row.trail) != (1, first.trail):
            return None
        visits.append(Visit(e, row.term))
    if selected_from(own.ids) != len(visits) and lift.counted.get(own.ids) != len(visits):
        raise Unproven("R307", f"{len(visits)} experts' rows are put together, there may be more")
    return Rows(Pairs(own.ids, own.slots, order), reroll(lift, own.slots, visits), 1, first.trail)


def finished(lift: Lift, node: Node, found: PartialSum | DenseSum) -> Combined:
    """What a sum over the experts visited by a loop means, once nothing more is added.

    Raises Unproven where the experts do not compute the same, or others are visited that it does not hold.
    """
    apart = lift.visited[found.ids] - {v.expert for v in found.visits}
    if apart:
        raise Unproven("R307", f"the rows of expert {min(apart)} are not in the sum that the others' are in")
    if isinstance(found, DenseSum):
        return every_expert.finished(lift, found)
    experts, term, beside = reroll_apart(lift, found.slots, found.visits)
    rows = Rows(Pairs(found.ids, found.slots), term, 1, (found.width,))
    assert value(node).is_floating_point()
    every = not beside and selected_from(found.ids) == experts
    return Combined(rows, found.base, None if every else experts, beside=beside)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::index_add": (index_add,),
    "aten::index_put": (index_put,),
    "aten::index_copy": (index_copy,),
    "aten::masked_scatter": (masked_scatter,),
    "aten::scatter_add": (scatter_add,),
    "aten::scatter_reduce": (scatter_add,),
    "aten::add": (add,),
    "aten::mul": (weigh,),
    "aten::cat": (concatenate,),
}
