"""The tensors of a finished term as the op takes them: the experts first, then an expert's matrix or vector.

@gate_up (E, 2F, D)            as it is
pack(@0.weight, @1.weight, …)  experts' own parameters, one after the other
expand(@norm.weight, [E, F])   a tensor that all experts read: a view of stride 0, so that nothing is copied
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node
from torch.fx.node import Argument

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import GEMMS, Step
from dsmoe_compiler.ir.graph import aten, shape, value
from dsmoe_compiler.passes.lift.state import Lift


@dataclass(frozen=True)
class ExpertsTensor:
    """A leaf of a finished term: a tensor with the experts first, their own one after the other, or one for
    all; `is_matrix` where rows are multiplied by it, else each row reads its expert's numbers.
    """

    parts: tuple[Node, ...]
    kind: Literal["stacked", "packed", "shared"]
    is_matrix: bool

    @property
    def count(self) -> int | None:
        """How many experts it is of; None where it is of all there are."""
        if self.kind == "shared":
            return None
        experts = len(self.parts) if self.kind == "packed" else shape(self.parts[0])[0]
        assert isinstance(experts, int)
        return experts


def experts_tensors(lift: Lift, term: int) -> dict[Step, ExpertsTensor]:
    """What a finished term reads of the experts, in order of appearance."""
    matrices = _matrices(lift, term)
    found = dict[Step, ExpertsTensor]()
    for t in lift.terms.reachable(term):
        leaf = lift.terms.steps[t]
        name = str(leaf.attrs[0]) if leaf.attrs else ""
        if leaf.op == "shared":
            found[leaf] = ExpertsTensor((lift.shared[name],), "shared", t in matrices)
        elif leaf.op == "expert" and name in lift.packs:
            found[leaf] = ExpertsTensor(lift.packs[name], "packed", t in matrices)
        elif leaf.op == "expert":
            found[leaf] = ExpertsTensor((lift.params[name],), "stacked", t in matrices)
    return found


def _matrices(lift: Lift, term: int) -> set[int]:
    """The terms that are the second operand of a product, and what these are made of."""
    steps = lift.terms.steps
    return {
        below
        for t in lift.terms.reachable(term)
        if steps[t].op in GEMMS
        for below in lift.terms.reachable(steps[t].args[1])
    }


def emit(lift: Lift, tensor: ExpertsTensor, count: int, near: Node) -> Node:
    """The tensor as one value of the graph, of `count` experts."""
    part = tensor.parts[0]
    if tensor.kind == "stacked" and shape(part)[0] != count:
        # Experts with tensors come first; a tensor may have entries for those without, which nothing reads.
        part = _call(lift, aten.slice.Tensor, (part, 0, 0, count), value(part)[:count], near)
    if tensor.kind == "packed":
        packed = all(lift.graph.parameter(p) is not None for p in tensor.parts)
        # Computed parts are no one's to move: they are copied, at each call, as they are computed.
        stacked = value(part).new_empty((count, *shape(part)))
        part = _call(lift, ops.PACK if packed else aten.stack.default, (list(tensor.parts),), stacked, near)
    sizes = shape(part)
    if tensor.is_matrix:
        return part if tensor.kind != "shared" else _expand(lift, part, (count, *sizes), near)
    if tensor.kind != "shared":
        flat = value(part).reshape(count, -1)
        return part if len(sizes) == 2 else _call(lift, aten.reshape.default, (part, [count, -1]), flat, near)
    if len(sizes) != 1:
        part = _call(lift, aten.reshape.default, (part, [-1]), value(part).reshape(-1), near)
    return _expand(lift, part, (count, shape(part)[0]), near)


def _expand(lift: Lift, part: Node, sizes: tuple[Argument, ...], near: Node) -> Node:
    return _call(lift, aten.expand.default, (part, list(sizes)), value(part).expand(*sizes), near)


def _call(
    lift: Lift, op: torch._ops.OpOverload, args: tuple[Argument, ...], val: torch.Tensor, near: Node
) -> Node:
    made = lift.graph.graph.call_function(op, args)
    made.meta = {**near.meta, "val": val}
    return made
