"""Replace each layer's combine by one `dsmoe::experts`, however the layer was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import Node

from dsmoe_compiler.ir.graph import (
    ProgramGraph,
    aten,
    common_module,
    source,
)
from dsmoe_compiler.ir.passes import LayerFacts, PassLog, Replacement
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.passes.lift import (
    accumulate,
    along_width,
    capacity,
    combine,
    coordinates,
    dense,
    dispatch,
    every_expert,
    experts_last,
    folded,
    gather,
    gathered,
    kept,
    masks,
    nonzero,
    one_expert,
    permutation,
    product,
    queue,
    rowwise,
    segments,
    slot_by_slot,
    weights,
)
from dsmoe_compiler.passes.lift.discover import Selection, find_selections, selectors_of
from dsmoe_compiler.passes.lift.explain import Explainer, refusal_at
from dsmoe_compiler.passes.lift.insert import behind, insert, sources_of
from dsmoe_compiler.passes.lift.state import Lift, Rule, Unproven
from dsmoe_compiler.passes.lift.values import (
    Capacity,
    Combined,
    DenseSum,
    Everywhere,
    OneExpert,
    Pairs,
)

# Where several rules know an operator, the first that answers is right: the particular before the general.
_FAMILIES = (
    queue.RULES,
    kept.RULES,
    capacity.RULES,
    dispatch.RULES,
    permutation.RULES,
    dense.RULES,
    masks.RULES,
    coordinates.RULES,
    weights.RULES,
    nonzero.RULES,
    one_expert.RULES,
    segments.RULES,
    accumulate.RULES,
    every_expert.RULES,
    experts_last.RULES,
    gather.RULES,
    product.RULES,
    gathered.RULES,
    slot_by_slot.RULES,
    combine.RULES,
    along_width.RULES,
    rowwise.RULES,
    folded.RULES,
)
RULES: dict[str, tuple[Rule, ...]] = {
    name: tuple(rule for family in _FAMILIES for rule in family.get(name, ()))
    for name in dict.fromkeys(name for family in _FAMILIES for name in family)
}


@dataclass(frozen=True)
class LiftExperts:
    """Every spelling of the routed experts becomes one op on the same leaves.

    before:
        %sorted, %perm = sort(reshape(%ids, [-1]))
        %rows = index(%x, [floor_divide(%perm, 2)])
        %h = _grouped_mm(%rows, @gate_up, cumsum(histc(to(%sorted, float32), 8, 0, 7), 0))
        …
        %y = sum(view(index(%weighted, [%inverse]), [T, 2, D]), [1])
    after:
        %y = dsmoe.experts(%x, %ids, %weights, [@gate_up, @down], "experts(…)")
    """

    name: ClassVar[str] = "lift_experts"

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        """Fuse what is understood, refuse the rest with the first value whose meaning was lost."""
        order = {n: i for i, n in enumerate(graph.nodes)}
        selections = {s.selector: s for s in find_selections(graph)}
        lift = Lift(graph, RULES)
        found_layers = lift.run(accumulate.finished)
        standing, combined = dict[Node, Node](), set[Node]()
        explainer = Explainer(lift, order)
        for node, found in found_layers:
            layer = _Layer.of(lift, node, found, selections)
            if layer is None:
                continue
            facts = LayerFacts(
                _unique(layer.name, log, combined, layer), layer.idiom, None, None, layer.source
            )
            understood = explainer.fused(node, layer.selector)
            facts = replace(facts, node=node.name, order=order[node], explanation=understood)
            combined.update(layer.selectors)
            try:
                experts = insert(lift, node, found, layer.ids, standing)
            except Unproven as e:
                refusal = refusal_at(e.code, e.because, node, facts.name)
                understood = explainer.unfinished(node, layer.selector, e.code, e.because)
                log.layer(replace(facts, refusal=refusal, explanation=understood))
                continue
            log.replace(
                Replacement(
                    facts.name,
                    experts.old,
                    experts.new,
                    experts.inputs,
                    "R304",
                    experts.nonnegative,
                    experts.choices,
                )
            )
            standing[experts.old] = experts.new
            spec = MoESpec(experts.slots, experts.spec)
            log.layer(replace(facts, spec=spec, node=experts.old.name, op=experts.op.name))
        for selector, selection in selections.items():
            if selector not in combined:
                refusal, explanation = explainer.refused(selection)
                first = selection.first_use
                facts = LayerFacts(selection.name, "unknown", None, refusal, selection.source, first.name)
                log.layer(replace(facts, order=order[first], explanation=explanation))
        return bool(log.replacements)


def _unique(name: str, log: PassLog, combined: set[Node], layer: _Layer) -> str:
    """The layer's name; numbered where one selection serves several sets of experts, or the name is taken."""
    taken = (f"{name} ({n})" for n in range(2, len(log.layers) + 3))
    again = name in log.layers or layer.selector in combined
    return next(t for t in taken if t not in log.layers) if again else name


@dataclass(frozen=True)
class _Layer:
    name: str
    idiom: str
    source: str
    selectors: tuple[Node, ...]
    ids: Node

    @property
    def selector(self) -> Node | None:
        """What selects, the first where slots are chosen one by one; None where nothing does."""
        return self.selectors[0] if self.selectors else None

    @staticmethod
    def of(lift: Lift, node: Node, found: Combined, selections: dict[Node, Selection]) -> _Layer | None:
        """The layer of a combine; None where nothing selects and no token is read (a bag of embeddings)."""
        domain = found.rows.domain
        ids = domain.ids if isinstance(domain, Pairs) else sources_of(lift, found)[0].ids
        assert ids is not None
        selectors = tuple(s for s in selectors_of(ids) if s in selections)
        selection = selections[selectors[0]] if selectors else None
        if selection is None and not lift.terms.leaves(found.rows.term, "token"):
            return None
        name = selection.name if selection else common_module([ids, node])
        return _Layer(name, _idiom(lift, node, found), source(node, name), selectors, ids)


def _idiom(lift: Lift, node: Node, found: Combined) -> str:
    """The field's name for the spelling."""
    if isinstance(found.rows.domain, Everywhere) or isinstance(lift.of(node), DenseSum):
        return "dense, weights zeroed"
    seen = behind(lift, node)
    if any("grouped_mm" in str(n.target) for n in seen):
        return "sorted, grouped GEMM"
    domains = {type(getattr(lift.of(n), "domain", None)) for n in seen}
    if Capacity in domains:
        return "capacity slots, one-hot dispatch"
    if OneExpert in domains:
        return "loop over experts"
    if Everywhere in domains:
        return "dense, rows gathered"
    if any(n.target in (aten.bmm.default, aten.matmul.default) for n in seen):
        return "gathered weights, batched GEMM"
    return "rows per pair"
