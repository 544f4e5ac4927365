"""The tensors a model holds: how large they are, and what of them one token, or a step of T tokens, reads.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.fx import Node

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.graph import ProgramGraph, ancestors, aten
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse

# Operators that read of their first operand the rows they are asked for, no others.
_LOOKUPS = frozenset(
    {aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default}
)


@dataclass(frozen=True)
class Routing:
    """Of E experts a token chooses K."""

    experts: int
    top_k: int

    @property
    def share(self) -> Fraction:
        """The part of the experts that one token uses."""
        return Fraction(min(self.top_k, self.experts), self.experts)

    def hit(self, tokens: int) -> float:
        """How many of the experts T tokens are expected to choose between them when every choice is as
        likely: E(1 − (1 − K/E)^T).
        """
        return self.experts * (1.0 - float(1 - self.share) ** tokens)


@dataclass(frozen=True)
class Held:
    """A tensor of the model; names of one memory are one. `is_read`: by the graph at all; `rows`: of a table
    that is only looked up in, how many it has; `routing`: of what only routed experts read, how they are
    chosen, and `choices` how often a forward does so for each token: once for each layer that they are of.
    """

    names: tuple[str, ...]
    numel: int
    itemsize: int
    is_parameter: bool
    is_read: bool
    rows: int | None = None
    routing: Routing | None = None
    choices: int = 1

    @property
    def activated(self) -> Fraction:
        """The numbers that one token's forward uses: all but those of the experts it did not choose. Whole
        only of a layer's tensors together: each may be one expert's.
        """
        return self.numel * (self.routing.share if self.routing else Fraction(1))

    def bytes_read(self, tokens: int) -> float:
        """What a step of T tokens is expected to read of it, each number once."""
        whole = self.numel * self.itemsize if self.is_read else 0
        if self.routing is not None:
            return whole * self.routing.hit(tokens * self.choices) / self.routing.experts
        if self.rows:
            return whole * min(tokens, self.rows) / self.rows
        return float(whole)


def held(graph: ProgramGraph) -> tuple[Held, ...]:
    """Every parameter, buffer and lifted constant of a graph after its passes, tied ones once."""
    parameters = graph.exported.graph_signature.inputs_to_parameters
    routings, choices = _routings(graph), _choices(graph)
    places = dict[object, list[Node]]()
    for node in graph.graph.find_nodes(op="placeholder"):
        if graph.parameter(node) is not None:
            places.setdefault(_memory(graph.tensor(node)), []).append(node)
    found = []
    for nodes in places.values():
        tensor = graph.tensor(nodes[0])
        reads = [(node, user) for node in nodes for user in node.users]
        found.append(
            Held(
                names=tuple(name for node in nodes if (name := graph.parameter(node)) is not None),
                numel=tensor.numel(),
                itemsize=tensor.element_size(),
                is_parameter=any(node.name in parameters for node in nodes),
                is_read=bool(reads),
                rows=tensor.shape[0] if reads and all(_is_lookup(*read) for read in reads) else None,
                routing=_in_common([routings.get(node) for node in nodes if node.users]),
                choices=sum(choices[node] for node in nodes),
            )
        )
    return tuple(found)


def routed_tensors(graph: ProgramGraph, layer: Node) -> frozenset[Node]:
    """The placeholders of the tensors that a fused op's experts have a part of each."""
    return frozenset(n for n in _feeders(layer) if graph.parameter(n) is not None)


def routing_of(layer: Node) -> Routing:
    """E and K of a fused op."""
    text = str(layer.args[-1])
    if layer.target is ops.MOE:
        spec = parse(text, MoESpec)
        return Routing(spec.experts.count, spec.top_k)
    ids: Any = layer.args[1]
    return Routing(parse(text, ExpertsSpec).count, int(ids.meta["val"].shape[1]))


def fused_ops(graph: ProgramGraph) -> list[Node]:
    """The nodes that are fused layers, in execution order."""
    return [node for node in graph.nodes if node.target in (ops.MOE, ops.EXPERTS)]


def _routings(graph: ProgramGraph) -> dict[Node, Routing]:
    """How each placeholder is routed whose tensor nothing but experts of fused ops reads."""
    layers = fused_ops(graph)
    feeders = {node for layer in layers for node in _feeders(layer)}
    found = dict[Node, Routing]()
    for layer in layers:
        mine = routing_of(layer)
        for tensor in routed_tensors(graph, layer):
            known = found.get(tensor, mine)
            found[tensor] = mine if mine.share > known.share else known
    inside = feeders | set(layers)
    return {tensor: routing for tensor, routing in found.items() if _stays(tensor, inside)}


def _choices(graph: ProgramGraph) -> Counter[Node]:
    """Of how many fused ops each placeholder's tensor is one of the experts'."""
    return Counter(tensor for layer in fused_ops(graph) for tensor in routed_tensors(graph, layer))


def _feeders(layer: Node) -> set[Node]:
    """The values that a fused op's experts' tensors are made of; not of those that all experts read alike."""
    params: Any = layer.args[2] if layer.target is ops.MOE else layer.args[3]
    return ancestors([p for p in params if p.meta["val"].stride(0) or p.meta["val"].shape[0] == 1])


def _stays(tensor: Node, inside: set[Node]) -> bool:
    """Whether nothing outside reads a tensor, or anything made of it on the way to the ops."""
    stack = [user for user in tensor.users]
    while stack:
        node = stack.pop()
        if node not in inside:
            return False
        if node.target not in (ops.MOE, ops.EXPERTS):
            stack += node.users
    return True


def _in_common(routings: list[Routing | None]) -> Routing | None:
    """Of one memory under several names: routed only if it is under all."""
    known = [routing for routing in routings if routing is not None]
    return max(known, key=lambda routing: routing.share) if known and len(known) == len(routings) else None


def _is_lookup(tensor: Node, reader: Node) -> bool:
    return reader.target in _LOOKUPS and reader.args[0] is tensor


def _memory(tensor: Tensor) -> object:
    """What two names of one tensor share, on the meta device too."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
