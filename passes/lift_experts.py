"""Replace each layer's combine by one `dsmoe::experts`, however the layer was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import Step
from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    ProgramGraph,
    aten,
    common_module,
    dtype,
    same_size,
    shape,
    source,
    value,
)
from dsmoe_compiler.ir.passes import LayerFacts, PassLog, Replacement
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, to_text
from dsmoe_compiler.passes.lift import combine, dense, gather, permutation, product, rowwise
from dsmoe_compiler.passes.lift.discover import Selection, find_selections, selector_of
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, Unproven
from dsmoe_compiler.passes.lift.values import Combined, Everywhere, Pairs

# Where several rules know an operator, the first that answers is right: the particular before the general.
_FAMILIES = (permutation.RULES, dense.RULES, gather.RULES, product.RULES, combine.RULES, rowwise.RULES)
RULES: dict[str, tuple[Rule, ...]] = {
    name: tuple(rule for family in _FAMILIES for rule in family.get(name, ()))
    for name in dict.fromkeys(name for family in _FAMILIES for name in family)
}


@dataclass(frozen=True)
class LiftExperts:
    """Every spelling of the routed experts becomes one op on the same leaves.

    before:
        %perm = argsort(flatten(%ids))
        %rows = index(%x, [%perm // 2])
        %h = grouped_mm(%rows, @gate_up, cumsum(histc(%ids)))
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
        done = dict[Node, bool]()
        for node, found in lift.run():
            facts = _Layer.of(lift, node, found, selections)
            try:
                experts = _insert(lift, node, found, facts.ids)
            except Unproven as e:
                refusal = Refusal(e.code, e.because, node.name, facts.source)
                log.layer(LayerFacts(facts.name, facts.idiom, None, refusal, facts.source, node.name, "", order[node]))
                continue
            log.replace(Replacement(facts.name, experts.old, experts.new, experts.inputs, "R304"))
            spec = MoESpec(experts.slots, experts.spec)
            at = (experts.old.name, experts.op.name, order[node])
            log.layer(LayerFacts(facts.name, facts.idiom, spec, None, facts.source, *at))
            if facts.selector is not None:
                done[facts.selector] = True
        for selector, selection in selections.items():
            if selector not in done and selection.name not in log.layers:
                log.layer(_refused(lift, selection, order))
        return bool(log.replacements)


@dataclass(frozen=True)
class _Layer:
    name: str
    idiom: str
    source: str
    selector: Node | None
    ids: Node

    @staticmethod
    def of(lift: Lift, node: Node, found: Combined, selections: dict[Node, Selection]) -> _Layer:
        domain = found.rows.domain
        if isinstance(domain, Pairs):
            ids = domain.ids
        else:
            ids = next(i for s in _sources(lift, found) if (i := s.ids) is not None)
        assert ids is not None
        selector = selector_of(ids)
        selection = selections.get(selector) if selector is not None else None
        name = selection.name if selection else common_module([ids, node])
        return _Layer(name, _idiom(lift, node, found), source(node, name), selector, ids)


def _sources(lift: Lift, found: Combined) -> list[PairSource]:
    return [lift.sources[str(s.attrs[0])] for s in lift.terms.leaves(found.rows.term, "pair")]


def _idiom(lift: Lift, node: Node, found: Combined) -> str:
    """The field's name for the spelling."""
    if isinstance(found.rows.domain, Everywhere):
        return "dense, weights zeroed"
    stack, seen = [node], set[Node]()
    while stack:
        at = stack.pop()
        if at in seen or at not in lift.meaning:
            continue
        seen.add(at)
        if "grouped_mm" in str(at.target):
            return "sorted, grouped GEMM"
        if at.target in (aten.bmm.default, aten.matmul.default):
            return "gathered weights, batched GEMM"
        stack.extend(at.all_input_nodes)
    return "rows per pair"


@dataclass(frozen=True)
class _Inserted:
    old: Node
    new: Node
    op: Node
    inputs: tuple[Node, ...]
    spec: ExpertsSpec
    slots: int


def _insert(lift: Lift, node: Node, found: Combined, ids: Node) -> _Inserted:
    """Put `dsmoe::experts` where the combine stands. Raises Unproven when the finished term does not fit the op."""
    terms, term = lift.terms, found.rows.term
    tokens = terms.leaves(term, "token")
    params = [lift.params[str(s.attrs[0])] for s in terms.leaves(term, "expert")]
    pairs = _sources(lift, found)
    if len(tokens) != 1:
        raise Unproven("R303", f"the experts read {len(tokens)} different inputs")
    if len(pairs) > 1 and any(not p.matrix for p in pairs[1:]):
        raise Unproven("R301", "two different routing weights meet in one layer")
    counts = {str(shape(p)[0]) for p in params}
    if not params or len(counts) != 1:
        raise Unproven("R302", "the layer's weights are not all indexed by the same experts")
    x = next(n for n in lift.graph.nodes if n.name == tokens[0].attrs[0])
    experts, hidden, slots = shape(params[0])[0], shape(x)[-1], shape(ids)[-1] if len(shape(ids)) > 1 else 1
    assert isinstance(experts, int) and isinstance(hidden, int) and isinstance(slots, int)
    old = _through_cast(node)
    rename = {tokens[0]: Step("x")}
    rename |= {s: Step("w") for s in terms.leaves(term, "pair")}
    rename |= {s: Step("p", (), (i,)) for i, s in enumerate(terms.leaves(term, "expert"))}
    out = str(dtype(old)).removeprefix("torch.") if old is not node else None
    spec = ExpertsSpec(experts, hidden, terms.body(term, rename), out)
    return _emit(lift, node, old, x, ids, pairs, params, spec, slots)


def _emit(
    lift: Lift,
    node: Node,
    old: Node,
    x: Node,
    ids: Node,
    pairs: list[PairSource],
    params: list[Node],
    spec: ExpertsSpec,
    slots: int,
) -> _Inserted:
    graph = lift.graph.graph
    with graph.inserting_before(node):
        tokens = shape(x)[0]
        ids_TK = _as_pairs(lift, ids, tokens, slots, ids)
        weights = _weights(lift, pairs, ids_TK, ids, tokens, slots, x)
        new = graph.call_function(ops.EXPERTS, (x, ids_TK, weights, params, to_text(spec)))
        new.meta = {k: v for k, v in old.meta.items() if k != "tensor_meta"}
        out = new
        if len(shape(node)) != 2:
            new.meta["val"] = value(old).reshape(tokens, shape(node)[-1])
            out = graph.call_function(aten.reshape.default, (new, list(value(old).shape)))
            out.meta = dict(old.meta)
    return _Inserted(old, out, new, (x, ids_TK, weights), spec, slots)


def _weights(
    lift: Lift, pairs: list[PairSource], ids_TK: Node, ids: Node, tokens: object, slots: int, x: Node
) -> Node:
    graph = lift.graph.graph
    if not pairs:
        weights = graph.call_function(aten.ones_like.default, (ids_TK,), {"dtype": dtype(x)})
        weights.meta = {**ids.meta, "val": value(ids_TK).to(dtype(x))}
        return weights
    if any(p.matrix for p in pairs):
        return _read_matrices(lift, pairs, ids_TK)
    return _as_pairs(lift, pairs[0].node, tokens, slots, ids)


def _read_matrices(lift: Lift, pairs: list[PairSource], ids_TK: Node) -> Node:
    """The weight of each pair out of (T, E) matrices; with several, all but the masks' own ones."""
    graph = lift.graph.graph
    chosen = [p for p in pairs if p.fill is None] or pairs[:1]
    if len(chosen) != 1 or any(p.fill is not None and not p.matrix for p in pairs):
        raise Unproven("R301", "two different routing weights meet in one layer")
    gathered = graph.call_function(aten.gather.default, (chosen[0].node, 1, ids_TK))
    gathered.meta = {**chosen[0].node.meta, "val": value(ids_TK).to(dtype(chosen[0].node))}
    return gathered


def _as_pairs(lift: Lift, node: Node, tokens: object, slots: int, ids: Node) -> Node:
    """The node seen through reshapes as (T, K), reshaped only if no view of it already is."""
    at = node
    while True:
        sizes = shape(at)
        if len(sizes) == 2 and same_size(sizes[0], tokens) and same_size(sizes[1], slots):  # type: ignore[arg-type]
            return at
        below = at.args[0] if at.args else None
        if at.target not in VIEWS | COPIES | {aten.unsqueeze.default} or not isinstance(below, Node):
            break
        at = below
    graph = lift.graph.graph
    made = graph.call_function(aten.reshape.default, (node, [-1, slots]))
    made.meta = {**node.meta, "val": value(node).reshape(tokens, slots)}
    return made


def _through_cast(node: Node) -> Node:
    """The combine, or the cast that is all anybody reads of it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in CASTS and value(users[0]).is_floating_point():
        return users[0]
    return node


def _refused(lift: Lift, selection: Selection, order: dict[Node, int]) -> LayerFacts:
    """A layer nobody combined: the first loss on its own ids says why."""
    own = [
        lost
        for lost in lift.losses
        if (lost.ids is not None and selector_of(lost.ids) is selection.selector) or lost.node is selection.first_use
    ]
    if own:
        lost = min(own, key=lambda lost: order[lost.node])
        refusal = Refusal(lost.code, lost.because, lost.node.name, source(lost.node, selection.name))
    else:
        because = f"the ids are first used by {selection.first_use.target}, a spelling that is not known"
        refusal = Refusal("R407", because, selection.first_use.name, selection.source)
    at = order[selection.first_use]
    return LayerFacts(selection.name, "unknown", None, refusal, selection.source, selection.first_use.name, "", at)
