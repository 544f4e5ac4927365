"""Rules of code that computes one slot of all tokens after the other, and adds them up.

out = out + w[:, k, None] * rows of P[ids[:, k]]      for every slot k

Each slot's rows are pairs of the column of ids; where they are the same term of the column of weights, their
sum is that of the pairs of all slots.
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import dtype, is_tensor, same_shape, same_size, shape
from dsmoe_compiler.passes.lift.masks import slot_of
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import Combined, Filled, Pairs, Rows, SlotSum, Value


def add(lift: Lift, node: Node) -> Value | None:
    """One slot's rows added to those of the slots before, to zeros, or to another's."""
    if argument(node, "alpha", 1) != 1 or len(node.args) != 2:
        return None
    found = [_slots(lift, node, operand) for operand in node.args]
    sums = [f for f in found if isinstance(f, SlotSum)]
    if None in found or not sums:
        return None
    first = sums[0]
    terms = tuple(t for s in sums for t in s.terms)
    if any((s.ids, s.width) != (first.ids, first.width) for s in sums):
        return None
    if len({slot for slot, _ in terms}) != len(terms):
        raise Unproven("R302", "the rows of a slot are added twice")
    joined = SlotSum(first.ids, first.slots, terms, first.width)
    return _whole(lift, joined) if len(terms) == first.slots else joined


def _slots(lift: Lift, node: Node, operand: object) -> SlotSum | Filled | None:
    """What an operand adds: rows of slots, or zeros."""
    found = lift.of(operand)
    if not isinstance(operand, Node) or not is_tensor(operand) or dtype(operand) != dtype(node):
        return None
    if not same_shape(operand, node):
        return None
    if isinstance(found, Filled):
        return found if found.number == 0 else None
    if not isinstance(found, Rows):
        return found if isinstance(found, SlotSum) else None
    domain = found.domain
    if not isinstance(domain, Pairs) or domain.ids is None or domain.slots != 1 or domain.order is not None:
        return None
    column = slot_of(domain.ids)
    root = lift.ids_root(column[0]) if column is not None else None
    if column is None or root is None or root[0] is not column[0] or (found.lead, len(found.trail)) != (1, 1):
        return None
    return SlotSum(*root, ((column[1], _of_slot(lift, found.term, *column)),), found.width)


def _of_slot(lift: Lift, term: int, ids: Node, slot: int) -> int:
    """The term with the weights of all slots where it has a slot's column of them.

    Raises Unproven where it is weighed by anything else.
    """
    step = lift.terms.steps[term]
    if step.op == "pair":
        source = lift.sources[str(step.attrs[0])]
        column = _column(source.node) if source == PairSource(source.node) else None
        if column is None or column[1] != slot or not same_shape(column[0], ids):
            because = f"slot {slot} is weighed by %{source.node.name}, which is not its column of the weights"
            raise Unproven("R302", because)
        return lift.pair(PairSource(column[0]))
    args = tuple(_of_slot(lift, a, ids, slot) for a in step.args)
    return lift.terms.number(step.op, args, step.attrs) if args else term


def _column(node: Node) -> tuple[Node, int] | None:
    """(weights (T, K), k) where the node is their column k, with or without a dimension of size 1."""
    if operator_name(node) == "aten::unsqueeze" and same_size(shape(node)[-1], 1):
        below = node.args[0]
        return slot_of(below) if isinstance(below, Node) else None
    if operator_name(node) != "aten::slice" or argument(node, "dim") not in (-1, len(shape(node)) - 1):
        return slot_of(node)
    start, whole = argument(node, "start") or 0, node.args[0]
    if not isinstance(start, int) or start < 0 or argument(node, "step") != 1 or not isinstance(whole, Node):
        return None
    return (whole, start) if same_size(shape(node)[-1], 1) else None


def _whole(lift: Lift, found: SlotSum) -> Combined:
    """Raises Unproven where the slots do not compute the same."""
    terms = {term for _, term in found.terms}
    if len(terms) != 1:
        raise Unproven("R302", "a slot computes something else than the others")
    return Combined(Rows(Pairs(found.ids, found.slots), terms.pop(), 1, (found.width,)))


RULES: dict[str, tuple[Rule, ...]] = {"aten::add": (add,)}
