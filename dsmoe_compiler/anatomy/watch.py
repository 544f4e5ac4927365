"""Watching the passes to remember what each layer was made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from dsmoe_compiler.anatomy.describe import describe
from dsmoe_compiler.anatomy.region import computed_between, copy_of, within_module
from dsmoe_compiler.anatomy.roles import Landmarks, roles_of, without_combine
from dsmoe_compiler.instrument import PassRun
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import LayerFacts, Pass
from dsmoe_compiler.passes.lift.state import row_base
from dsmoe_compiler.report.drawing.layer_graph import LayerAnatomy, LayerGraph
from dsmoe_compiler.report.report import Report


@dataclass(frozen=True)
class _Trace:
    """Names of a fused layer's values: in the graph before, and `now` in the graph as it has become."""

    tokens: str
    routing: tuple[str, ...]
    parameters: frozenset[str]
    combine: str
    result: str
    now: str


@dataclass
class Anatomist:
    """An instrument that keeps the graph as it was before a layer was found, and follows each layer."""

    _before: dict[str, Node] = field(default_factory=dict)
    _graph: ProgramGraph | None = None
    _facts: dict[str, LayerFacts] = field(default_factory=dict)
    _traces: dict[str, _Trace] = field(default_factory=dict)

    def before(self, step: Pass, graph: ProgramGraph) -> None:
        """Keep the graph, until a pass finds a layer in it."""
        self._graph = graph
        if not self._facts:
            self._before = copy_of(graph.graph)

    def after(self, step: Pass, graph: ProgramGraph, run: PassRun) -> None:
        """Follow each layer through what the pass replaced."""
        self._facts = {facts.name: facts for facts in run.layers}
        nodes = {n.name: n for n in graph.nodes}
        for change in run.changes:
            known = self._traces.get(change.layer)
            if known is None:
                op = nodes.get(self._facts[change.layer].op) if change.layer in self._facts else None
                if op is not None and op.target is ops.EXPERTS:
                    self._traces[change.layer] = self._trace(op, change.old.name, change.new.name)
            elif change.old.name in self._before:
                self._traces[change.layer] = replace(known, result=change.old.name, now=change.new.name)
            elif change.old.name == known.now:
                self._traces[change.layer] = replace(known, now=change.new.name)

    def layer(self, report: Report, name: str) -> LayerAnatomy:
        """The anatomy of one of the report's layers. Raises KeyError when there is no such layer."""
        found = {each.name: each for each in report.layers}[name]
        trace = self._traces.get(name)
        if trace is None or not found.fused:
            return LayerAnatomy(report.model, found, self._refused(name), None)
        return LayerAnatomy(report.model, found, self._was(name, trace), self._is(name, trace))

    def _trace(self, op: Node, old: str, new: str) -> _Trace:
        x, ids, weights, params = op.args[:4]
        assert isinstance(x, Node) and isinstance(params, Sequence)
        (tokens,) = self._origins([x])[:1]
        routing = self._origins([a for a in (ids, weights) if isinstance(a, Node)])
        parameters = self._origins([p for p in params if isinstance(p, Node)])
        return _Trace(tokens, tuple(routing), frozenset(parameters), old, old, new)

    def _origins(self, nodes: Iterable[Node]) -> list[str]:
        """The values of the graph before that the nodes are, or are made of."""
        found, stack = list[str](), list(nodes)
        while stack:
            at = stack.pop(0)
            if at.name in self._before:
                found.append(at.name)
            else:
                stack += at.all_input_nodes
        return list(dict.fromkeys(found))

    def _was(self, name: str, trace: _Trace) -> LayerGraph:
        graph, nodes = self._graph, self._before
        assert graph is not None
        tokens = row_base(nodes[trace.tokens])
        layer = computed_between(graph, nodes.values(), tokens, nodes[trace.result], name)
        landmarks = Landmarks(
            tuple(nodes[n] for n in trace.routing),
            frozenset(nodes[n] for n in trace.parameters),
            nodes[trace.combine],
        )
        return describe(graph, layer, roles_of(graph, layer.nodes, landmarks))

    def _is(self, name: str, trace: _Trace) -> LayerGraph:
        graph = self._graph
        assert graph is not None
        nodes = {n.name: n for n in graph.nodes}
        op = nodes[self._facts[name].op]
        assert isinstance(op.args[0], Node)
        layer = computed_between(graph, graph.nodes, row_base(op.args[0]), nodes[trace.now], name)
        routing = tuple(a for a in op.args[1:3] if isinstance(a, Node))
        roles = roles_of(graph, layer.nodes, Landmarks(routing, frozenset(), op))
        return describe(graph, layer, roles, spec=self._facts[name].spec, op=op)

    def _refused(self, name: str) -> LayerGraph:
        graph = self._graph
        assert graph is not None
        refusal = self._facts[name].refusal
        lost = self._before.get(refusal.node) if refusal else None
        layer = within_module(graph, self._before.values(), name, lost)
        return describe(graph, layer, roles_of(graph, layer.nodes, without_combine(graph, layer.nodes)), lost)
