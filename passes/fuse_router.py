"""Understand the router in front of each `dsmoe::experts`, and make both one `dsmoe::moe`.

Read backwards from the ids and the weights. Every stage is optional but the scores and the top-k:

    weights <- cast <- scale <- divide by the sum <- the selected scores
    ids     <- top-k <- keep the best groups <- add the selection bias <- scores
    scores  <- softmax or sigmoid <- cast <- logits = x · Wᵀ + b
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch.fx import Node

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.graph import (
    CASTS,
    ProgramGraph,
    Size,
    aten,
    dtype,
    is_tensor,
    same_size,
    shape,
    through,
)
from dsmoe_compiler.ir.passes import PassLog, Replacement
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, parse
from dsmoe_compiler.passes.lift.explain import refusal_at
from dsmoe_compiler.passes.lift.state import argument, operator_name, row_base, uncast_rows
from dsmoe_compiler.passes.region import RESHAPES, first_overwritten, same_rows


class _Unknown(Exception):
    """The router is not of a known form: a code, a sentence, the node."""

    def __init__(self, code: str, because: str, node: Node) -> None:
        super().__init__(because)
        self.code, self.because, self.node = code, because, node


@dataclass(frozen=True)
class FuseRouter:
    """A router of known form moves into the op; any other stays in the graph as it was.

    before:
        %logits = linear(%x, @gate)
        %w, %ids = topk(softmax(%logits, -1), 2)
        %y = dsmoe.experts(%x, %ids, %w, […], "experts(…)")
    after:
        %y = dsmoe.moe(%x, [@gate], […], [], "moe(…, router=router(…))")
    """

    name: ClassVar[str] = "fuse_router"

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        """Returns whether any router was fused; a remark says why each other one was not."""
        changed = False
        # What experts without tensors add, beside those with some, has no router to itself.
        for node in [n for n in graph.nodes if n.target is ops.EXPERTS and n.args[3]]:
            facts = next((f for f in log.layers.values() if f.op == node.name), None)
            try:
                new, spec, inputs = _fused(graph, node)
            except _Unknown as e:
                name = facts.name if facts else node.name
                log.remark(name, "router as written", refusal_at(e.code, e.because, e.node, name))
                continue
            name = facts.name if facts else node.name
            log.replace(Replacement(name, node, new, inputs, "R203"))
            if facts:
                log.layer(replace(facts, spec=spec, op=new.name))
            changed = True
        return changed


def _fused(graph: ProgramGraph, node: Node) -> tuple[Node, MoESpec, tuple[Node, ...]]:
    x, ids, weights, params, text = node.args
    assert isinstance(x, Node) and isinstance(ids, Node) and isinstance(weights, Node)
    found = _Reading(graph, x).read(ids, weights)
    experts = parse(str(text), ExpertsSpec)
    if not same_size(shape(found.weight)[0], experts.count):
        raise _Unknown("R204", "the router scores another number of experts than there are", node)
    if not same_size(shape(ids)[-1], found.spec.top_k):
        raise _Unknown("R204", "a token's experts come from more than one top-k", node)
    router = [t for t in (found.weight, found.bias, found.selection_bias) if t is not None]
    if (written := first_overwritten(graph, x, (ids, weights, *router))) is not None:
        raise _Unknown("R408", f"the router reads %{written.name}, which is overwritten in place", written)
    spec = MoESpec(found.spec.top_k, experts, found.spec)
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(ops.MOE, (x, router, params, [], spec.text))
        new.meta = dict(node.meta)
    return new, spec, (row_base(x),)


@dataclass(frozen=True)
class _Router:
    spec: RouterSpec
    weight: Node
    bias: Node | None
    selection_bias: Node | None


@dataclass
class _Reading:
    """One router, read from its ids and weights back to x."""

    graph: ProgramGraph
    x: Node

    def read(self, ids: Node, weights: Node) -> _Router:
        """Raises _Unknown at the first value that is not of known form."""
        top, k = self._top_k(ids)
        ranked = _node(top.args[0])
        weights, weight_dtype = self._uncast(weights)
        weights, scale = self._unscale(weights)
        weights, renormalize, epsilon = self._unnormalized(weights)
        if weights.target in (aten.softmax.int, aten.sigmoid.default, aten._softmax.default):
            return self._after_top_k(weights, top, ranked, k, scale, renormalize, epsilon, weight_dtype)
        scores = self._selected_scores(weights, ids, top)
        weigh: Literal["scores", "ranked"] = "scores"
        if scores is ranked and self._fills(ranked):
            scores, weigh = through(_node(through(ranked, RESHAPES).args[0]), RESHAPES), "ranked"
        if not same_size(shape(ranked)[-1], shape(scores)[-1]):
            raise _Unknown("R204", "top-k does not rank all the experts of a token together", top)
        ranked, groups = self._ungroup(ranked, scores)
        ranked, bias = self._unbias(ranked, scores)
        if through(ranked, RESHAPES) is not through(scores, RESHAPES):
            raise _Unknown("R201", "top-k ranks other values than the scores that weigh", ranked)
        kind, logits, score_dtype = self._scored(scores)
        weight, logits_bias, logits_dtype = self._logits(logits)
        spec = RouterSpec(
            k,
            kind,
            "scores",
            renormalize,
            epsilon,
            scale,
            logits_bias is not None,
            bias is not None,
            logits_dtype=logits_dtype,
            score_dtype=score_dtype,
            weight_dtype=weight_dtype,
            weigh=weigh,
            **groups,
        )
        return _Router(spec, weight, logits_bias, bias)

    def _after_top_k(
        self,
        scores: Node,
        top: Node,
        ranked: Node,
        k: int,
        scale: float,
        renormalize: bool,
        epsilon: float,
        weight_dtype: str | None,
    ) -> _Router:
        kind, selected, score_dtype = self._scored(scores)
        if not _is_part(selected, top, 0):
            raise _Unknown("R201", "the scores after top-k are not those of the selected logits", selected)
        weight, bias, logits_dtype = self._logits(ranked)
        spec = RouterSpec(
            k,
            kind,
            "logits",
            renormalize,
            epsilon,
            scale,
            bias is not None,
            logits_dtype=logits_dtype,
            score_dtype=score_dtype,
            weight_dtype=weight_dtype,
        )
        return _Router(spec, weight, bias, None)

    def _top_k(self, ids: Node) -> tuple[Node, int]:
        picked = uncast_rows(ids)
        top = picked.args[0] if operator_name(picked) == "getitem" else None
        if not isinstance(top, Node) or top.target is not aten.topk.default or picked.args[1] != 1:
            raise _Unknown("R201", f"the ids come from {picked.target}, not from a top-k", picked)
        last = len(shape(_node(top.args[0]))) - 1
        if argument(top, "dim") % (last + 1) != last or not argument(top, "largest"):
            raise _Unknown("R204", "top-k does not take the largest along the experts", top)
        return top, int(argument(top, "k"))

    def _uncast(self, node: Node) -> tuple[Node, str | None]:
        node = row_base(node)
        if node.target not in CASTS:
            return node, None
        return row_base(_node(node.args[0])), str(dtype(node)).removeprefix("torch.")

    def _unscale(self, node: Node) -> tuple[Node, float]:
        if node.target in (aten.mul.Tensor, aten.mul.Scalar):
            for a, b in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
                if isinstance(a, Node) and isinstance(b, (int, float)):
                    return row_base(a), float(b)
        return node, 1.0

    def _unnormalized(self, node: Node) -> tuple[Node, bool, float]:
        """weights / (weights.sum(-1, keepdim) + epsilon)."""
        if node.target is not aten.div.Tensor or argument(node, "rounding_mode"):
            return node, False, 0.0
        selected, total = node.args[0], node.args[1]
        epsilon = 0.0
        if isinstance(total, Node) and total.target in (aten.add.Tensor, aten.add.Scalar):
            if not isinstance(total.args[1], (int, float)) or argument(total, "alpha") != 1:
                raise _Unknown("R201", "the weights' denominator is not their sum plus a number", total)
            epsilon, total = float(total.args[1]), total.args[0]
        is_sum = isinstance(total, Node) and total.target is aten.sum.dim_IntList
        if (
            not isinstance(selected, Node)
            or not isinstance(total, Node)
            or not is_sum
            or total.args[0] is not selected
        ):
            raise _Unknown("R201", "the weights are divided by something that is not their own sum", node)
        last = len(shape(selected)) - 1
        along_k = [d % (last + 1) for d in argument(total, "dim")] == [last] and argument(total, "keepdim")
        if not along_k or argument(total, "dtype") is not None:
            raise _Unknown("R201", "the weights' sum is not taken over the selected experts", total)
        return row_base(selected), True, epsilon

    def _selected_scores(self, weights: Node, ids: Node, top: Node) -> Node:
        """The (T, E) scores that `weights` are selected from: by top-k itself, or by a gather at its ids."""
        if _is_part(weights, top, 0):
            return _node(top.args[0])
        if weights.target is aten.gather.default:
            at = uncast_rows(_node(weights.args[2]))
            last = len(shape(weights)) - 1
            if at is uncast_rows(ids) and argument(weights, "dim") % (last + 1) == last:
                return _node(weights.args[0])
        raise _Unknown(
            "R201", f"the weights come from {weights.target}, not from the selected scores", weights
        )

    def _fills(self, ranked: Node) -> bool:
        return through(ranked, RESHAPES).target is aten.masked_fill.Scalar

    def _ungroup(self, ranked: Node, scores: Node) -> tuple[Node, dict[str, Any]]:
        """masked_fill(ranked, outside the best groups, fill): ranked, and which groups are kept."""
        experts = shape(ranked)[-1]
        ranked = through(ranked, RESHAPES)
        if ranked is through(scores, RESHAPES) or not self._fills(ranked):
            return ranked, {}
        inner, mask, fill = through(_node(ranked.args[0]), RESHAPES), _node(ranked.args[1]), ranked.args[2]
        assert isinstance(fill, (int, float)) and isinstance(experts, int), ranked
        kept, groups = self._kept_groups(mask, experts)
        top, top_groups = self._top_k(_node(kept.args[2]))
        kind, grouped = self._group_scores(row_base(_node(top.args[0])))
        own, widened = shape(ranked), shape(mask)
        fits = own[-1] == widened[-1] == experts or own[-2:] == (groups, experts // groups) == (
            widened[-2],
            own[-1],
        )
        if not fits or len(own) != len(widened):
            raise _Unknown("R201", "the mask over groups does not cover each group's experts", mask)
        if through(grouped, RESHAPES) is not inner or shape(grouped)[-2:] != (groups, experts // groups):
            raise _Unknown("R201", "groups are ranked by other scores than the experts", grouped)
        limits = {"groups": groups, "top_groups": top_groups, "group_score": kind, "group_fill": float(fill)}
        return inner, limits

    def _kept_groups(self, mask: Node, experts: int) -> tuple[Node, int]:
        """(zeros.scatter(1, best groups, 1), G) under its complement, each group widened to its experts."""
        node, negated, widened = mask, False, False
        while node.target is not aten.scatter.value:
            below = node.args[0] if node.args else None
            if not isinstance(below, Node) or not is_tensor(below):
                break
            sizes, under = shape(node), shape(below)
            complement = node.target is aten.eq.Scalar and node.args[1] == 0
            if complement or node.target in (aten.bitwise_not.default, aten.logical_not.default):
                negated = not negated
            elif node.target is aten.unsqueeze.default:
                if widened or argument(node, "dim") not in (-1, len(under)):
                    break
                widened = True
            elif node.target in RESHAPES:
                splits = sizes[-1] == experts and under[-1] != 1 and _product(under[-2:]) == experts
                if not same_size(sizes[-1], under[-1]) and not splits:
                    break
            elif node.target is aten.expand.default:
                if under[-1] != 1 or not same_size(sizes[-2], under[-2]):
                    break
            elif node.target not in CASTS:
                break
            node = below
        groups, zeros = shape(node)[-1], node.args[0] if node.args else None
        if node.target is not aten.scatter.value or not negated or not widened or node.args[3] != 1:
            raise _Unknown("R201", "the mask over groups is not the complement of the groups kept", node)
        if operator_name(_node(zeros)) not in _ZEROS or argument(node, "dim") not in (
            -1,
            len(shape(node)) - 1,
        ):
            raise _Unknown("R201", "the groups kept are not marked by a scatter of ones onto zeros", node)
        assert isinstance(groups, int)
        return node, groups

    def _group_scores(self, best: Node) -> tuple[str, Node]:
        """(how a group (…, G) is scored along the last dimension of what, that (…, G, E/G))."""
        if best.target is aten.sum.dim_IntList and _along_last(best):
            two = row_base(_node(best.args[0]))
            top = two.args[0] if operator_name(two) == "getitem" and two.args[1] == 0 else None
            if isinstance(top, Node) and top.target is aten.topk.default and _along_last(top, 2):
                return "top2", _node(top.args[0])
        if best.target is aten.amax.default and _along_last(best):
            return "max", _node(best.args[0])
        if operator_name(best) == "getitem" and best.args[1] == 0:
            largest = _node(best.args[0])
            if largest.target is aten.max.dim and _along_last(largest):
                return "max", _node(largest.args[0])
        raise _Unknown("R201", f"groups are scored by {best.target}, which is not known", best)

    def _unbias(self, ranked: Node, scores: Node) -> tuple[Node, Node | None]:
        """scores + a parameter (E,) that selects and does not weigh."""
        if ranked is through(scores, RESHAPES) or ranked.target is not aten.add.Tensor:
            return ranked, None
        for a, b in ((ranked.args[0], ranked.args[1]), (ranked.args[1], ranked.args[0])):
            if not isinstance(a, Node) or not isinstance(b, Node) or argument(ranked, "alpha") != 1:
                continue
            bias = through(b, RESHAPES, frozenset({aten.unsqueeze.default}))
            one = self.graph.parameter(bias) is not None and len(shape(bias)) == 1
            if one and same_size(shape(bias)[0], shape(b)[-1]) and same_size(shape(b)[-1], shape(scores)[-1]):
                return through(a, RESHAPES), bias
        raise _Unknown(
            "R201", "the scores are shifted by something that is no parameter over the experts", ranked
        )

    def _scored(self, scores: Node) -> tuple[Literal["softmax", "sigmoid"], Node, str | None]:
        """(kind, the value scored, the dtype of the scores if it was changed for them)."""
        scores = row_base(scores)
        name = operator_name(scores)
        if name not in ("aten::softmax", "aten::_softmax", "aten::sigmoid"):
            raise _Unknown(
                "R201", f"the scores come from {scores.target}, neither softmax nor sigmoid", scores
            )
        below = row_base(_node(scores.args[0]))
        if name != "aten::sigmoid" and argument(scores, "dim") % len(shape(scores)) != len(shape(scores)) - 1:
            raise _Unknown("R201", "softmax is not taken over the experts", scores)
        cast = str(dtype(scores)).removeprefix("torch.") if dtype(scores) != dtype(below) else None
        if below.target in CASTS:
            if cast is not None:
                raise _Unknown("R201", "the logits are cast twice before they are scored", scores)
            cast, below = str(dtype(below)).removeprefix("torch."), row_base(_node(below.args[0]))
        return ("sigmoid" if name == "aten::sigmoid" else "softmax"), below, cast

    def _logits(self, logits: Node) -> tuple[Node, Node | None, str | None]:
        """(weight (E, D), bias, the dtype x and weight were cast to) of logits = linear(x, weight, bias)."""
        logits = row_base(logits)
        if logits.target is not aten.linear.default:
            raise _Unknown("R201", f"the logits come from {logits.target}, not from a linear layer", logits)
        bias = argument(logits, "bias")
        operands = [
            self._cast_operand(_node(a)) for a in (logits.args[0], logits.args[1], bias) if a is not None
        ]
        casts = {cast for _, cast in operands}
        if len(casts) != 1:
            raise _Unknown("R201", "the logits' operands are cast to different types", logits)
        x, weight, *rest = (node for node, _ in operands)
        if not same_rows(x, self.x):
            raise _Unknown("R202", "the router reads another tensor than the experts", logits)
        if any(self.graph.parameter(t) is None for t in (weight, *rest)):
            raise _Unknown("R201", "the router's weight is computed, not a parameter", logits)
        return weight, (rest[0] if rest else None), casts.pop()

    def _cast_operand(self, node: Node) -> tuple[Node, str | None]:
        if same_rows(node, self.x):
            return node, None
        if node.target in CASTS:
            return _node(node.args[0]), str(dtype(node)).removeprefix("torch.")
        below = row_base(node)
        if below.target in CASTS and is_tensor(below):
            return _node(below.args[0]), str(dtype(below)).removeprefix("torch.")
        return node, None


_ZEROS = ("aten::zeros_like", "aten::zeros", "aten::new_zeros")


def _node(argument: object) -> Node:
    assert isinstance(argument, Node), argument
    return argument


def _product(sizes: tuple[Size, ...]) -> Size:
    product: Size = 1
    for size in sizes:
        product = product * size
    return product


def _along_last(node: Node, k: int | None = None) -> bool:
    """Whether a reduction (or top-k) runs along the last dimension of its input and drops it (or keeps k)."""
    last = len(shape(_node(node.args[0]))) - 1
    dims = argument(node, "dim")
    along = [d % (last + 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])] == [last]
    return along and (argument(node, "k") == k if k else not argument(node, "keepdim"))


def _is_part(node: Node, of: Node, index: int) -> bool:
    node = row_base(node)
    return operator_name(node) == "getitem" and node.args[0] is of and bool(node.args[1] == index)
