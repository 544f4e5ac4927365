"""Rules of capacity dispatch: experts with a fixed number of slots, pairs put into them by one-hots.

    dispatch (T, E, C) = Σ_k hot(expert) · hot(place)         who sits where
    rows     (E, C, D) = einsum("tec,td->ecd", dispatch, x)   each slot holds one pair's token, or nothing
    out      (T, D)    = einsum("tec,ecd->td", combine, rows) each pair's row times its weight

A slot that two pairs shared would hold the sum of their tokens: so the pairs must be proven to sit apart.
What nobody sits in is computed and never read. The order in which places were given does not matter, nor
which pairs found none: the masks that say so are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, dtype, same_shape, same_size, shape, value
from dsmoe_compiler.passes.lift.dispatch import equation, seats_of, tokens_of
from dsmoe_compiler.passes.lift.kept import chain, descends
from dsmoe_compiler.passes.lift.queue import at_most, largest_places, of_queue
from dsmoe_compiler.passes.lift.reroll import reroll
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Capacity,
    Combined,
    OneExpert,
    OneHot,
    Pairs,
    Parts,
    Queue,
    Rows,
    Value,
    Visit,
)


def apply_flat(lift: Lift, node: Node) -> Value | None:
    """dispatch (E·C, T) @ x, combine (T, E·C) @ rows."""
    left, right = node.args[:2]
    flat = seats_of(lift, left, "XT")
    if (parts := flat or seats_of(lift, left, "ECT")) and isinstance(right, Node) and len(shape(right)) == 2:
        found = _dispatched(lift, parts, right, (0, ""))
        return replace(found, lead=1) if flat and isinstance(found, Rows) else found
    rows = lift.rows(right)
    if rows is None or not isinstance(rows.domain, Capacity) or (rows.lead, rows.domain.axis) != (1, 0):
        return None
    parts = seats_of(lift, left, "TX")
    return _combined(lift, node, parts, rows) if parts else None


def apply(lift: Lift, node: Node) -> Value | None:
    """einsum("tec,td->ecd", dispatch, x), einsum("tec,ecd->td", combine, rows)."""
    operands, parsed = argument(node, "tensors"), equation(node)
    if len(operands) != 2 or parsed is None:
        return None
    names, out = parsed
    for at, other in ((0, 1), (1, 0)):
        parts = seats_of(lift, operands[at])
        if not parts:
            continue
        letters = dict(zip(parts[0].axes, names[at], strict=True))
        tokens, rest = "".join(letters[t] for t in tokens_of(parts[0])), names[other]
        e, c, rows = letters["E"], letters["C"], lift.rows(operands[other])
        if rows is None and rest[:-1] == tokens and out[-1] == rest[-1]:
            return _dispatched(lift, parts, operands[other], _slot_axes(out[:-1], e, c, tokens))
        if rows is not None and isinstance(rows.domain, Capacity) and out == tokens + rest[-1]:
            own = _slot_axes(rest[:-1], e, c, tokens)
            grouped = rows.lead == 3
            fits = own is not None and own == (rows.domain.axis, tokens[:-1] if grouped else "")
            return _combined(lift, node, parts, rows) if fits and rows.lead == len(rest) - 1 else None
    return None


def _slot_axes(names: str, e: str, c: str, tokens: str) -> tuple[int, str] | None:
    """(the experts' place among the dimensions of slots, the tokens' dimensions that are among them), for
    (E, C), (C, E), (E, groups, C) or (groups, E, C); None for anything else.
    """
    if sorted(names) == sorted(e + c):
        return names.index(e), ""
    group = tokens[:-1]
    known = {e + group + c: 0, group + e + c: 1} if len(group) == 1 else {}
    return (known[names], group) if names in known else None


def _dispatched(
    lift: Lift, parts: tuple[OneHot, ...], x: Node, slots: tuple[int, str] | None
) -> Value | None:
    if any(p.weight is not None for p in parts) or not lift.opaque(x) or slots is None:
        return None
    width, (axis, group) = shape(x)[-1], slots
    if not isinstance(width, int) or not value(x).is_floating_point():
        return None
    if any(p.place is None or bool(p.place.queue.groups) != bool(group) for p in parts):
        raise Unproven("R409", "places are counted in other groups of tokens than slots are kept for")
    _require_apart(lift, parts)
    ids = _joint(lift, [p.ids for p in parts])
    root = None if ids is None else lift.ids_root(ids)
    if ids is None or root is None:
        return None
    groups = lift.extent(shape(x)[0]) if group else None
    domain = Capacity(parts[0].experts, axis, ids, root[1], parts, groups)
    return Rows(domain, lift.token(x), 3 if group else 2, (width,))


def _require_apart(lift: Lift, parts: tuple[OneHot, ...]) -> None:
    """Prove that no two pairs sit in one slot. Raises Unproven."""
    for part in parts:
        place = part.place
        assert place is not None
        if not descends(lift, part.ids, place.of):
            raise Unproven("R409", "pairs sit at places that were counted for other pairs")
        known = largest_places(lift, part.ids, place.queue)
        if place.most is not None and not any(at_most(most, place.most) for most in known):
            because = "places past the capacity become the last one, and their pairs are dispatched, too"
            raise Unproven("R409", because)
    for i, a in enumerate(parts):
        for b in parts[i + 1 :]:
            if not _after(lift, a, b) and not _after(lift, b, a):
                raise Unproven("R409", "pairs of two slots may sit in one place: neither counts the other's")


def _after(lift: Lift, first: OneHot, second: OneHot) -> bool:
    """Whether the second's queue starts where the first's ends."""
    assert first.place is not None and second.place is not None
    a, b = first.place.queue, second.place.queue
    before = list(b.before)
    for ids in a.before:
        if ids not in before:
            return False
        before.remove(ids)
    if a.groups != b.groups:
        return False
    counted = [c for c in before if descends(lift, first.ids, c) and _front_of(lift, c, a)]
    return a.start == b.start and bool(counted)


def _front_of(lift: Lift, ids: Node, queue: Queue) -> bool:
    """Whether `ids` keep the first pairs of every expert's queue, all of them or up to a limit."""
    steps = list(chain(lift, ids))
    if queue.ids not in steps:
        return False
    limits = [lift.kept[i].limit for i in steps[: steps.index(queue.ids)]]
    return all(limit is not None and of_queue(limit, queue) for limit in limits)


def _joint(lift: Lift, parts: Sequence[Node]) -> Node | None:
    """Values of one slot each as one of all slots."""
    if len(parts) == 1:
        return parts[0]
    if any(not same_shape(p, parts[0]) or dtype(p) != dtype(parts[0]) for p in parts):
        return None
    like = value(parts[0]).new_empty((*shape(parts[0]), len(parts)))
    return lift.make(aten.stack.default, (list(parts), -1), like, tuple(parts))


def _combined(lift: Lift, node: Node, parts: tuple[OneHot, ...], rows: Rows) -> Value | None:
    """Each pair's row, read where it sits, times its weight."""
    domain = rows.domain
    assert isinstance(domain, Capacity)
    for part in parts:
        seats = [s for s in domain.parts if s.place == part.place and descends(lift, part.ids, s.ids)]
        if not seats:
            raise Unproven("R409", "rows are combined from capacity slots that their pairs were not put in")
        if seats[0].hidden is not None and seats[0].hidden is not _uncast(lift, part.weight):
            raise Unproven("R409", "pairs are dispatched where one weight is not 0, and combined by another")
    ids = _joint(lift, [p.ids for p in parts])
    weights = [p.weight for p in parts if p.weight is not None]
    if ids is None or len(weights) not in (0, len(parts)) or len(rows.trail) != 1:
        return None
    term = rows.term
    if weights:
        weight = _joint(lift, weights)
        if weight is None or dtype(weight) != dtype(node):
            return None
        term = lift.terms.number("mul", (term, lift.pair(PairSource(weight))))
    root = lift.ids_root(ids)
    if root is None:
        return None
    hidden = tuple(s.hidden for s in domain.parts if s.hidden is not None)
    found = Rows(Pairs(*root), term, 1, rows.trail)
    return Combined(found, visited=domain.experts, nonnegative=hidden)


def _uncast(lift: Lift, weight: Node | None) -> Node | None:
    """Weights before the walk cast them: 0 stays 0."""
    while weight in lift.made and weight.target is aten.to.dtype:
        (weight,) = lift.made[weight]
    return weight


def of_expert(lift: Lift, node: Node) -> Value | None:
    """rows[e], and all of them by unbind, chunk or split: the slots of one expert."""
    rows = lift.rows(node.args[0])
    if rows is None or not isinstance(rows.domain, Capacity) or rows.lead < 2:
        return None
    if argument(node, "dim") % (rows.lead + len(rows.trail)) != rows.domain.axis:
        return None
    experts = rows.domain.experts
    own = [_slots_of(rows, e, rows.lead - 1) for e in range(experts)]
    if operator_name(node) == "aten::select":
        index: int = argument(node, "index")
        return own[index]
    if operator_name(node) == "aten::unbind":
        return Parts(tuple(own))
    ones = [same_size(part.shape[rows.domain.axis], 1) for part in value(node)]
    grouped = rows.domain.groups is not None
    if (rows.lead, rows.domain.axis) != (2, 0) or grouped or len(ones) != experts or not all(ones):
        return None
    return Parts(tuple(_slots_of(rows, e, 2) for e in range(experts)))


def _slots_of(rows: Rows, expert: int, lead: int) -> Rows:
    assert isinstance(rows.domain, Capacity)
    domain = OneExpert(rows.domain.ids, rows.domain.slots, expert, rows.domain)
    return Rows(domain, rows.term, lead, rows.trail)


def together(lift: Lift, node: Node) -> Value | None:
    """stack or cat of the slots of all experts."""
    parts = [lift.rows(part) for part in argument(node, "tensors")]
    first, dim = parts[0] if parts else None, argument(node, "dim")
    if first is None or not isinstance(first.domain, OneExpert):
        return None
    capacity = first.domain.order
    if not isinstance(capacity, Capacity) or len(parts) != capacity.experts:
        return None
    stacks, grouped = operator_name(node) == "aten::stack", capacity.groups is not None
    if dim not in ((0, 1) if stacks else (0,)) or (first.lead == 2 and stacks != grouped):
        return None
    if not stacks and first.lead == 1:
        return None
    visits = list[Visit]()
    for e, part in enumerate(parts):
        if part is None or part.domain != replace(first.domain, expert=e):
            return None
        if (part.lead, part.trail) != (first.lead, first.trail):
            return None
        visits.append(Visit(e, part.term))
    term = reroll(lift, 1, visits)
    return Rows(replace(capacity, axis=dim), term, first.lead + stacks, first.trail)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::einsum": (apply,),
    "aten::matmul": (apply_flat,),
    "aten::mm": (apply_flat,),
    "aten::select": (of_expert,),
    "aten::unbind": (of_expert,),
    "aten::chunk": (of_expert,),
    "aten::split": (of_expert,),
    "aten::stack": (together,),
    "aten::cat": (together,),
}
