"""Which values of a graph make up a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.fx import Graph, Node

from dsmoe_compiler.ir.graph import ProgramGraph, dtype, is_tensor, module_path
from dsmoe_compiler.ir.printer import LayerNodes, is_assertion, is_scalar, operator_text

_NEAR = 120  # as many operators as one still reads in a picture


def computed_between(
    graph: ProgramGraph, nodes: Collection[Node], tokens: Node | None, result: Node, layer: str
) -> LayerNodes:
    """What `result` is computed by from `tokens` on, and within the layer's module where it has a name."""
    found, stack = {result}, [result]
    while stack:
        at = stack.pop()
        for below in at.all_input_nodes:
            inside = below is not tokens and below.op == "call_function" and _within(below, layer)
            if inside and below not in found and not (is_scalar(at) and is_tensor(below)):
                found.add(below)
                stack.append(below)
    found |= {n for n in nodes if is_assertion(n) and any(a in found for a in _behind(n))}
    return _layer(graph, nodes, found, layer, tokens, (result,))


def within_module(graph: ProgramGraph, nodes: Collection[Node], layer: str, lost: Node | None) -> LayerNodes:
    """Everything that was made in a module; of a layer that has none, what is nearest to where understanding
    ended.
    """
    found = {n for n in nodes if n.op == "call_function" and _within(n, layer)}
    if not module_of(layer) and lost is not None:
        found = _nearest(found, lost)
    results = [n for n in nodes if n in found and is_tensor(n) and any(u not in found for u in n.users)]
    return _layer(graph, nodes, found, layer, _routed(graph, nodes, found), tuple(results))


def _nearest(found: set[Node], lost: Node) -> set[Node]:
    """At most `_NEAR` of the values, those fewest steps from the lost one."""
    near, ring = {lost: None}, [lost]
    while ring and len(near) < _NEAR:
        steps = [n for at in ring for n in (*at.all_input_nodes, *at.users) if n in found and n not in near]
        ring = list(dict.fromkeys(steps))[: _NEAR - len(near)]
        near |= dict.fromkeys(ring)
    return set(near)


def _routed(graph: ProgramGraph, nodes: Iterable[Node], found: set[Node]) -> Node | None:
    """The value from outside that experts are chosen for: the nearest one behind a top-k."""
    ring = [n for n in nodes if n in found and selects(n)]
    seen = set(ring)
    while ring:
        ring = [a for n in ring for a in n.all_input_nodes if not is_scalar(a) and a not in seen]
        outside = [a for a in ring if a not in found and graph.parameter(a) is None and is_tensor(a)]
        if outside:
            return outside[0]
        seen |= set(ring)
    return None


def selects(node: Node) -> bool:
    """Whether a node chooses: a top-k or an argmax."""
    return node.op == "call_function" and operator_text(node) in ("topk", "argmax")


def module_of(layer: str) -> str:
    """The module a layer's name stands for: several layers of one module are numbered."""
    return layer.split("#")[0].split(" (")[0]


def _layer(
    graph: ProgramGraph,
    nodes: Iterable[Node],
    found: set[Node],
    layer: str,
    tokens: Node | None,
    results: tuple[Node, ...],
) -> LayerNodes:
    order = {n: i for i, n in enumerate(nodes)}
    data = [n for n in found if not is_scalar(n) and not is_assertion(n)]
    read = {a for n in data for a in n.all_input_nodes if a not in found and graph.parameter(a) is None}
    inputs = sorted(
        read, key=lambda n: (n is not tokens, not (is_tensor(n) and dtype(n).is_floating_point), order[n])
    )
    return LayerNodes(module_of(layer), tuple(inputs), tuple(n for n in nodes if n in found), results)


def _within(node: Node, layer: str) -> bool:
    """Whether a value was made in the layer's module; values nobody knows the module of are where they are
    read.
    """
    module, path = module_of(layer), ".".join(module_path(node))
    unknown = not node.meta.get("nn_module_stack") or path.startswith("_")
    return not module or unknown or f"{path}.".startswith(f"{module}.")


def _behind(node: Node) -> list[Node]:
    """What a check looks at, through the sizes it is computed of."""
    seen, stack = list[Node](), list(node.all_input_nodes)
    while stack:
        at = stack.pop()
        seen.append(at)
        if at.op == "call_function" and not is_tensor(at) and len(seen) < 20:
            stack += at.all_input_nodes
    return seen


def copy_of(graph: Graph) -> dict[str, Node]:
    """A copy of a graph's nodes under their own names, in order; it stays when the graph changes."""
    copied, made = Graph(), dict[Node, Node]()
    names = dict[str, Node]()
    for node in graph.nodes:
        made[node] = copied.node_copy(node, lambda n: made[n])
        names[node.name] = made[node]
    return names
