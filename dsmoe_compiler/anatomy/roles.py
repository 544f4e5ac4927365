"""What each value of a layer is there for: router, permutation, experts, combine, shared experts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import Node

from dsmoe_compiler.anatomy.region import selects
from dsmoe_compiler.ir.graph import ProgramGraph, is_tensor, shape
from dsmoe_compiler.ir.printer import is_scalar
from dsmoe_compiler.report.drawing.layer_graph import Role

_SEVERAL = 3


@dataclass(frozen=True)
class Landmarks:
    """Values that say where a layer's parts meet: `routing` (ids and weights), the experts' parameters, and
    the combined rows, None where nothing was combined.
    """

    routing: tuple[Node, ...]
    parameters: frozenset[Node]
    combine: Node | None


def roles_of(graph: ProgramGraph, nodes: Collection[Node], landmarks: Landmarks) -> dict[Node, Role]:
    """The role of each of a layer's values."""
    inside, flow = set(nodes), _flow(nodes)
    router = _with_ancestors(flow, landmarks.routing) & inside
    of_experts = _with_descendants(flow, landmarks.parameters) & inside - router
    readers = {n for n in of_experts if _joins(n, of_experts, landmarks.parameters)}
    experts = of_experts & _with_ancestors(flow, readers)
    to_experts = _with_ancestors(flow, experts) & inside
    combine = landmarks.combine
    routed = _with_ancestors(flow, [combine] if combine else of_experts) & inside
    after = _with_descendants(flow, [combine] if combine else of_experts) & inside
    chosen = _with_descendants(flow, landmarks.routing)

    def role(node: Node) -> Role:
        if node in router:
            return "router"
        if node in experts:
            return "experts"
        if node in of_experts or node in after:
            return "combine"
        own = combine is None and node not in chosen and _has_parameters(graph, flow, node)
        if own or not (node in routed or node in chosen):
            return "shared"
        return "permutation" if node in to_experts else "combine"

    return {node: role(node) for node in nodes}


def without_combine(graph: ProgramGraph, nodes: Collection[Node]) -> Landmarks:
    """Landmarks of a layer that was not understood: what selects routes; parameters that are stacked, that
    only selected rows meet, or of which there are several alike, are the experts'.
    """
    selectors = [n for n in nodes if selects(n)]
    routing = [u for s in selectors for u in s.users if "getitem" in str(u.target)] or selectors
    flow = _flow(nodes)
    before = _with_ancestors(flow, routing)
    for node in nodes:  # weights are often picked by the ids, divided by their sum, scaled
        below = [a for a in node.all_input_nodes if not is_scalar(a)]
        routed = bool(below) and all(a in before and a.op == "call_function" for a in below)
        if routed and node not in before and _floats(node) and _has_parameters(graph, flow, node):
            routing.append(node)
            before.add(node)
    chosen = _with_descendants(flow, routing)
    given = {a for n in nodes for a in n.all_input_nodes if a.op == "placeholder" and is_tensor(a)}
    read = {a for a in given if graph.parameter(a) is not None}
    stacked = {a for a in given if len(shape(a)) > 2 and a not in before}
    met = {a for n in nodes if n in chosen for a in n.all_input_nodes if a in read and a not in before}
    families = Counter(_family(graph, a) for a in read)
    several = {a for a in read if families[_family(graph, a)] >= _SEVERAL}
    return Landmarks(tuple(routing), frozenset(stacked | met | several - before), None)


def _floats(node: Node) -> bool:
    """Whether a node's value, or the first of them, is a floating tensor."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, torch.Tensor) and first.is_floating_point()


def _family(graph: ProgramGraph, parameter: Node) -> str:
    """A parameter's name without its numbers."""
    return re.sub(r"(?<=[._])\d+(?=\.)", "#", graph.parameter(parameter) or "")


def _flow(nodes: Collection[Node]) -> nx.DiGraph[Node]:
    """What data flows where; sizes are no data."""
    flow: nx.DiGraph[Node] = nx.DiGraph()
    flow.add_nodes_from(nodes)
    for node in nodes:
        flow.add_edges_from((below, node) for below in node.all_input_nodes if not is_scalar(below))
    return flow


def _with_ancestors(flow: nx.DiGraph[Node], nodes: Collection[Node]) -> set[Node]:
    return {a for n in nodes if n in flow for a in nx.ancestors(flow, n)} | set(nodes)


def _with_descendants(flow: nx.DiGraph[Node], nodes: Collection[Node]) -> set[Node]:
    return {d for n in nodes if n in flow for d in nx.descendants(flow, n)} | set(nodes)


def _joins(node: Node, of_experts: set[Node], parameters: Collection[Node]) -> bool:
    """Whether the node reads an expert's parameter, or what was made of one alone."""
    return any(_is_weight(a, of_experts, parameters) for a in node.all_input_nodes)


def _is_weight(node: Node, of_experts: set[Node], parameters: Collection[Node]) -> bool:
    if node in parameters:
        return True
    inputs = node.all_input_nodes
    if node not in of_experts or not inputs:
        return False
    first = inputs[0]  # weights that were picked by ids are weights still
    return _is_weight(first, of_experts, parameters) and _picks(node)


def _picks(node: Node) -> bool:
    name = str(node.target)
    return any(
        word in name
        for word in ("index", "select", "transpose", "view", "reshape", "permute", "to.", "slice", "clone")
    ) or name in ("aten.t.default", "aten.mT.default")


def _has_parameters(graph: ProgramGraph, flow: nx.DiGraph[Node], node: Node) -> bool:
    return any(graph.parameter(n) is not None for n in {*nx.ancestors(flow, node), node})
