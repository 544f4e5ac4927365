"""Shared experts (DeepSeekMoE): an expert every token visits, added to the routed sum, moves into the op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import Node

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import Body
from dsmoe_compiler.ir.graph import ProgramGraph, aten, dtype, shape
from dsmoe_compiler.ir.passes import PassLog, Replacement
from dsmoe_compiler.ir.spec import MoESpec, SharedSpec, parse
from dsmoe_compiler.passes.lift.state import argument
from dsmoe_compiler.passes.region import RESHAPES, row_base, row_body


@dataclass(frozen=True)
class FuseSharedExperts:
    """routed + shared(x), plain or gated by a sigmoid per token, becomes one op on x.

    before:
        %routed = dsmoe.moe(%x, [@gate], […], [], "moe(…)")
        %shared = linear(mul(silu(linear(%x, @g)), linear(%x, @u)), @d)
        %y = add(%routed, %shared)
    after:
        %y = dsmoe.moe(%x, [@gate], […], [@g, @u, @d], "moe(…, shared=shared(…))")
    """

    name: ClassVar[str] = "fuse_shared_experts"

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        """Returns whether any shared expert was fused."""
        changed = False
        for node in [n for n in graph.nodes if n.target is ops.MOE]:
            facts = next((f for f in log.layers.values() if f.op == node.name), None)
            found = _added_to(graph, node)
            if found is None:
                continue
            add, body, params = found
            x, router, experts, _, text = node.args
            assert isinstance(x, Node)
            shared = SharedSpec(body, _width(body, params), _is_gated(body))
            spec = replace(parse(str(text), MoESpec), shared=shared)
            with graph.graph.inserting_before(add):
                new = graph.graph.call_function(ops.MOE, (x, router, experts, params, spec.text))
                new.meta = dict(node.meta)
                out = new
                if add.meta["val"].dim() != 2:
                    out = graph.graph.call_function(aten.reshape.default, (new, _sizes(add, node)))
                    out.meta = dict(add.meta)
            log.replace(Replacement(facts.name if facts else node.name, add, out, (row_base(x),), "R306"))
            if facts:
                log.layer(replace(facts, spec=spec, op=new.name))
            changed = True
        return changed


def _added_to(graph: ProgramGraph, moe: Node) -> tuple[Node, Body, list[Node]] | None:
    """The sum of the routed output, perhaps reshaped, and a body of the same rows."""
    routed = moe
    while len(routed.users) == 1 and (user := next(iter(routed.users))).target in RESHAPES:
        routed = user
    x = moe.args[0]
    assert isinstance(x, Node)
    for add in routed.users:
        if add.target is not aten.add.Tensor or argument(add, "alpha") != 1 or len(routed.users) != 1:
            continue
        other = add.args[1] if add.args[0] is routed else add.args[0]
        if not isinstance(other, Node) or len(shape(other)) != len(shape(routed)) or dtype(other) != dtype(moe):
            continue
        found = row_body(graph, other, x)
        if found is not None and any(s.op == "linear" for s in found[0].steps):
            return add, *found
    return None


def _sizes(add: Node, moe: Node) -> object:
    """The shape argument of the reshape between the routed output and the sum."""
    for operand in add.args[:2]:
        if isinstance(operand, Node) and operand.target in RESHAPES:
            return operand.args[1]
    return list(add.meta["val"].shape)


def _width(body: Body, params: list[Node]) -> int:
    """The input width of the last linear: all shared experts' hidden width together."""
    last = max(i for i, s in enumerate(body.steps) if s.op == "linear" and _is_down(body, i))
    weight = params[int(body.steps[body.steps[last].args[1]].attrs[0] or 0)]
    width = shape(weight)[1]
    assert isinstance(width, int)
    return width


def _is_down(body: Body, at: int) -> bool:
    """Whether a linear reads computed rows, not x itself."""
    return body.steps[body.steps[at].args[0]].op != "x"


def _is_gated(body: Body) -> bool:
    """Whether the last product scales the experts' output by a sigmoid of its own linear of x."""
    last = body.steps[body.result]
    if last.op != "mul":
        return False
    return any(body.steps[a].op == "sigmoid" and body.steps[body.steps[a].args[0]].op == "linear" for a in last.args)
