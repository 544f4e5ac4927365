"""Another form of a lowered program, which also returns how many pairs each fused layer gives each expert.

It is the same graph with a count beside each layer; the lowered program itself stays as it is and knows
nothing of this. A count is made where the ids are, and nobody waits for it.

Shapes: x_TD, ids_TK; counts (E + 1,) int64: first the pairs that were dropped (id −1), then each expert's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse
from dsmoe_compiler.runtime.lower import OP
from dsmoe_compiler.runtime.straight_line import straight_line

# The program's flat inputs, to (what the program returns, the counts of each layer).
CountingForm: TypeAlias = Callable[..., tuple[Any, tuple[Tensor, ...]]]


def counting_form(module: GraphModule, exported: ExportedProgram, layers: Sequence[str]) -> CountingForm:
    """The counting form of `module`, which is `exported` lowered; `layers` names the ops of the layers to
    count, as the exported graph does.
    """
    graph, copies = Graph(), dict[Node, Node]()
    outputs = graph.graph_copy(module.graph, copies)
    lowered = {n.meta.get(OP, n.name): n for n in copies}
    fused = {n.name: n for n in exported.graph.nodes if n.target in (ops.MOE, ops.EXPERTS)}
    counts = tuple(_count(graph, fused[layer], copies[lowered[layer]]) for layer in layers)
    graph.output((outputs, counts))
    return straight_line(GraphModule(module, graph))


def _count(graph: Graph, fused: Node, runs: Node) -> Node:
    """The count of a layer, before the node that runs it: `fused` in the exported graph."""
    spec = str(fused.args[-1])
    with graph.inserting_before(runs):
        if fused.target is ops.EXPERTS:
            return graph.call_function(count_ids, (runs.args[1], parse(spec, ExpertsSpec).count))
        return graph.call_function(count_routed, (runs.args[0], runs.args[1], spec))


def count_ids(ids_TK: Tensor, experts: int) -> Tensor:
    """The counts of these ids. On their device, without the host learning anything of them."""
    places_P = ids_TK.reshape(-1).long() + 1
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids_TK.device)
    return counts.scatter_add_(0, places_P, torch.ones_like(places_P))


def count_routed(x_TD: Tensor, router: Sequence[Tensor], spec: str) -> Tensor:
    """The counts of a layer that routes itself: what the reference chooses for the same x."""
    layer = parse(spec, MoESpec)
    with torch.no_grad():
        _, ids_TK = reference.route_tokens(x_TD, router, layer)
    return count_ids(ids_TK, layer.experts.count)
