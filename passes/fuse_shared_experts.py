"""Shared experts (DeepSeekMoE): an expert every token visits, added to the routed sum, moves into the op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import Node

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import Body
from dsmoe_compiler.ir.graph import ProgramGraph, aten, dtype, same_size, shape
from dsmoe_compiler.ir.passes import PassLog, Replacement
from dsmoe_compiler.ir.spec import MoESpec, SharedSpec, parse
from dsmoe_compiler.passes.lift.state import argument, row_base
from dsmoe_compiler.passes.region import RESHAPES, first_overwritten, row_body, size_arguments


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
            sizes = size_arguments(graph, add)
            if sizes is None:
                name = facts.name if facts else node.name
                log.remark(name, "shared experts as written: their sum's sizes are held by no value")
                continue
            with graph.graph.inserting_before(add):
                new = graph.graph.call_function(ops.MOE, (x, router, experts, params, spec.text))
                new.meta = dict(node.meta)
                out = new
                if len(sizes) != 2:
                    out = graph.graph.call_function(aten.reshape.default, (new, sizes))
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
        if not isinstance(other, Node) or not _same_values(other, routed):
            continue
        found = row_body(graph, other, x)
        if found is None or not _downs(found[0]):  # without one it is a projection of x, not experts
            continue
        if first_overwritten(graph, x, (other,)) is None:
            return add, *found
    return None


def _same_values(a: Node, b: Node) -> bool:
    """Equal dtypes and sizes: adding them broadcasts nothing."""
    alike = dtype(a) == dtype(b) and len(shape(a)) == len(shape(b))
    return alike and all(map(same_size, shape(a), shape(b)))


def _width(body: Body, params: list[Node]) -> int:
    """The input width of the last linear: all shared experts' hidden width together."""
    weight = params[int(body.steps[body.steps[_downs(body)[-1]].args[1]].attrs[0] or 0)]
    width = shape(weight)[1]
    assert isinstance(width, int)
    return width


def _downs(body: Body) -> list[int]:
    """The linears that read computed rows, not x itself."""
    linears = (i for i, step in enumerate(body.steps) if step.op == "linear")
    return [i for i in linears if body.steps[body.steps[i].args[0]].op != "x"]


def _is_gated(body: Body) -> bool:
    """Whether the last product scales the experts' output by a sigmoid of its own linear of x."""
    last = body.steps[body.result]
    if last.op != "mul":
        return False
    return any(
        body.steps[a].op == "sigmoid" and body.steps[body.steps[a].args[0]].op == "linear" for a in last.args
    )
