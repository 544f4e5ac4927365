"""Rules by which a loop over experts puts its rows together.

out.index_add(0, tokens, rows)            each expert's rows added to its tokens
out[tokens] += rows                       the same, read, added and written back
y[mask] = rows, y[pairs] = rows           each expert's rows written to its pairs
cat([rows of expert 0, rows of 1, …])     the sorted pairs again
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import dtype, shape, value
from dsmoe_compiler.passes.lift.discover import require_distinct, selected_from
from dsmoe_compiler.passes.lift.reroll import reroll
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven, argument
from dsmoe_compiler.passes.lift.values import (
    Combined,
    Filled,
    Mask,
    OneExpert,
    Pairs,
    PartialRows,
    PartialSum,
    Permutation,
    Rows,
    Scratch,
    SlotOf,
    TokenOf,
    Value,
)


def index_add(lift: Lift, node: Node) -> Value | None:
    """out.index_add(0, tokens of one expert, its rows)."""
    at, rows = lift.of(node.args[2]), lift.rows(node.args[3])
    if not isinstance(at, TokenOf) or not isinstance(at.domain, OneExpert):
        return None
    if argument(node, "dim") != 0 or argument(node, "alpha") != 1:
        return None
    return _added(lift, node, at.domain, rows, node.args[3])


def index_put(lift: Lift, node: Node) -> Value | None:
    """out[tokens] = out[tokens] + rows, out[tokens] += rows by accumulation, y[pairs] = rows."""
    indices, written = argument(node, "indices"), node.args[2]
    rows = lift.rows(written)
    if rows is None or not isinstance(rows.domain, OneExpert):
        return None
    domain = _domain_at([lift.of(i) for i in indices], rows.domain)
    if domain is None:
        return None
    if domain == "pairs":
        return None if argument(node, "accumulate") else _written(lift, node, rows)
    if argument(node, "accumulate"):
        return _added(lift, node, rows.domain, rows, written)
    require_distinct(rows.domain.ids)
    rest = _without(lift, rows, node.args[0])
    return None if rest is None else _added(lift, node, rows.domain, rest, written)


def _domain_at(found: list[Value | None], domain: OneExpert) -> str | None:
    """What the indices say of the rows of `domain`: their "tokens", their "pairs", or something else."""
    match found:
        case [TokenOf(domain=at)] if at == domain:
            return "tokens"
        case [Permutation(domain=at)] if at == domain:
            return "pairs"
        case [TokenOf(domain=at), SlotOf(domain=also)] if at == also == domain:
            return "pairs"
        case [Mask(ids=ids, expert=expert, axes=axes)] if (ids, expert) == (domain.ids, domain.expert):
            if axes == "KT" or domain.order != "token":
                return None
            return "tokens" if axes == "T" else "pairs"
    return None


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
        raise Unproven("R402", f"rows are added at tokens of expert {domain.expert} that are not their own")
    if dtype(written) != dtype(node) or shape(node)[-1] != rows.width or len(shape(node)) != 2:
        return None
    so_far = lift.of(start)
    entry = (domain.expert, rows.term)
    if isinstance(so_far, PartialSum) and so_far.ids is domain.ids:
        if any(e == domain.expert for e, _ in so_far.terms):
            raise Unproven("R302", f"expert {domain.expert} is added twice")
        return PartialSum(domain.ids, domain.slots, (*so_far.terms, entry), rows.width, so_far.base)
    if isinstance(so_far, Filled) and so_far.number == 0:
        return PartialSum(domain.ids, domain.slots, (entry,), rows.width)
    if so_far is None or isinstance(so_far, (PartialSum, Combined)):
        return PartialSum(domain.ids, domain.slots, (entry,), rows.width, start)
    return None


def _written(lift: Lift, node: Node, rows: Rows) -> Value | None:
    """An expert's rows in their pairs' places; all pairs, once every expert that can be chosen is there."""
    domain, start = rows.domain, lift.of(node.args[0])
    assert isinstance(domain, OneExpert)
    source = node.args[2]
    assert isinstance(source, Node)
    lead = len(shape(node)) - len(rows.trail)
    if rows.lead != 1 or lead not in (1, 2) or dtype(source) != dtype(node):
        return None
    entry = (domain.expert, rows.term)
    if isinstance(start, PartialRows) and (start.ids, start.trail) == (domain.ids, rows.trail):
        if any(e == domain.expert for e, _ in start.terms):
            raise Unproven("R302", f"the rows of expert {domain.expert} are written twice")
        terms = (*start.terms, entry)
    elif isinstance(start, (Filled, Scratch)):
        terms = (entry,)
    else:
        return None
    if selected_from(domain.ids) != len(terms):
        return PartialRows(domain.ids, domain.slots, terms, rows.trail)
    return Rows(Pairs(domain.ids, domain.slots), reroll(lift, terms), lead, rows.trail)


def concatenate(lift: Lift, node: Node) -> Value | None:
    """cat of the segments of sorted rows, expert by expert."""
    rows = [lift.rows(a) for a in argument(node, "tensors")]
    if not rows or argument(node, "dim") % len(shape(node)) != 0:
        return None
    first = rows[0]
    if first is None or not isinstance(first.domain, OneExpert) or not isinstance(first.domain.order, Node):
        return None
    own, order = first.domain, first.domain.order
    terms = []
    for e, row in enumerate(rows):
        if row is None or row.domain != OneExpert(own.ids, own.slots, e, order):
            return None
        if (row.lead, row.trail) != (1, first.trail):
            return None
        terms.append((e, row.term))
    if selected_from(own.ids) != len(terms) and lift.counted.get(own.ids) != len(terms):
        raise Unproven("R302", f"{len(terms)} experts' rows are put together, there may be more")
    return Rows(Pairs(own.ids, own.slots, order), reroll(lift, terms), 1, first.trail)


def finished(lift: Lift, node: Node, found: PartialSum) -> Combined:
    """What a sum over the experts visited by a loop means, once nothing more is added.

    Raises Unproven where the experts do not compute the same.
    """
    rows = Rows(Pairs(found.ids, found.slots), reroll(lift, found.terms), 1, (found.width,))
    assert value(node).is_floating_point()
    return Combined(rows, found.base, drops=selected_from(found.ids) != len(found.terms))


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::index_add": (index_add,),
    "aten::index_put": (index_put,),
    "aten::cat": (concatenate,),
}
