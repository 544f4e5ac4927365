"""One term over an expert index from the terms of separate experts.

A loop's bodies, unrolled, differ in their weights alone. Walking the terms of all experts at once, each
place must hold the same operator everywhere; where they hold tensors of their own, these become one tensor
with the experts first, made of the parts in the experts' order, or, where all hold the same, one they share.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from dsmoe_compiler.ir.body import Step
from dsmoe_compiler.ir.graph import dtype, shape
from dsmoe_compiler.passes.lift.state import Lift, Unproven
from dsmoe_compiler.passes.lift.values import Group, Visit


def reroll(lift: Lift, slots: int, visits: Sequence[Visit]) -> int:
    """The term of any expert, from what a loop computed for each of them, or for each of them and each slot.

    Raises Unproven where the experts are not 0, 1, 2, … each once, or do not compute the same.
    """
    return _one(lift, [_of_expert(e, slots, visits) for e in _numbered(visits)])


def reroll_apart(lift: Lift, slots: int, visits: Sequence[Visit]) -> tuple[int, int, tuple[Group, ...]]:
    """(how many experts there are with tensors, their term, those without), the first being those with.

    Experts without tensors hand their token back, say, times its weight. Raises Unproven as `reroll` does.
    """
    experts = _numbered(visits)
    terms = [_of_expert(e, slots, visits) for e in experts]
    bare = [not any(lift.terms.leaves(t, leaf) for leaf in ("own", "expert", "shared")) for t in terms]
    count = bare.index(True) if True in bare else len(terms)
    if count == 0 or not all(bare[count:]):
        return len(terms), _one(lift, terms), ()
    beside = list[Group]()
    for e, term in enumerate(terms[count:], count):
        if beside and beside[-1].term == term:
            beside[-1] = Group(beside[-1].first, e + 1, term)
        else:
            beside.append(Group(e, e + 1, term))
    return count, _one(lift, terms[:count]), tuple(beside)


def _one(lift: Lift, terms: Sequence[int]) -> int:
    """The term of any expert from those of all."""
    term = _Walk(lift).same(tuple(terms))
    if not lift.terms.leaves(term, "expert"):  # one module is all experts: its weights say who was chosen
        term = _Walk(lift, shares=False).same(tuple(terms))
    return term


def _numbered(visits: Sequence[Visit]) -> list[int]:
    experts = sorted({v.expert for v in visits})
    if experts[0] < 0:
        raise Unproven("R307", f"a loop visits expert {experts[0]}, experts are numbered from 0")
    if experts != list(range(len(experts))):
        missing = next(e for e in range(experts[-1] + 1) if e not in experts)
        raise Unproven("R307", f"expert {missing} is left out of a loop that visits expert {experts[-1]}")
    return experts


def _of_expert(expert: int, slots: int, visits: Sequence[Visit]) -> int:
    """The one term of all visits to an expert, which must be of all slots."""
    own = [v for v in visits if v.expert == expert]
    visited = sorted(v.slot for v in own if v.slot is not None)
    if visited and visited != list(range(slots)):
        missing = next(k for k in range(slots) if k not in visited)
        raise Unproven("R307", f"slot {missing} is left out for expert {expert}")
    if len({v.term for v in own}) != 1:
        raise Unproven(
            "R308", f"expert {expert} computes something else in slot {own[-1].slot} than in slot 0"
        )
    return own[0].term


class _Walk:
    def __init__(self, lift: Lift, *, shares: bool = True) -> None:
        self.lift, self.shares, self.done = lift, shares, dict[tuple[int, ...], int]()

    def same(self, terms: tuple[int, ...]) -> int:
        if terms not in self.done:
            self.done[terms] = self._same(terms)
        return self.done[terms]

    def _same(self, terms: tuple[int, ...]) -> int:
        table = self.lift.terms
        steps = [table.steps[t] for t in terms]
        first = steps[0]
        if first.op == "own" and all(s.op == "own" for s in steps):
            return self._packed([str(s.attrs[0]) for s in steps])
        for e, step in enumerate(steps[1:], 1):
            if (step.op, step.attrs) != (first.op, first.attrs):
                raise Unproven("R308", f"expert {e} {_words(step)}, expert 0 {_words(first)}")
        if not first.args:
            return terms[0]
        args = tuple(self.same(tuple(s.args[i] for s in steps)) for i in range(len(first.args)))
        return table.number(first.op, args, first.attrs)

    def _packed(self, names: list[str]) -> int:
        if self.shares and len(set(names)) == 1:
            return self.lift.share(self.lift.own[names[0]])
        parts = tuple(self.lift.own[name] for name in names)
        for e, part in enumerate(parts):
            if (shape(part), dtype(part)) != (shape(parts[0]), dtype(parts[0])):
                kinds = f"a weight of expert {e} is {_kind(part)}, of expert 0 {_kind(parts[0])}"
                raise Unproven("R308", kinds)
        return self.lift.pack(parts)


def _words(step: Step) -> str:
    names = {
        "token": "reads %",
        "pair": "weighs by %",
        "expert": "uses @",
        "own": "uses @",
        "shared": "uses @",
    }
    if step.op in names:
        return f"{names[step.op]}{step.attrs[0]}"
    if step.op == "const":
        return f"uses {step.attrs[0]}"
    attributes = f" {step.attrs}" if step.attrs else ""
    return f"computes {step.op}{attributes}"


def _kind(node: Node) -> str:
    sizes = "x".join(str(s) for s in shape(node))
    return f"{sizes} {str(dtype(node)).removeprefix('torch.')}"
