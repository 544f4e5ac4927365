"""Rules by which rows become tokens again, and the proof that dense experts may be read sparsely.

rows.view(T, K, D).sum(1)                 pairs in their own order
zeros.index_add(0, tokens, sorted rows)   sorted pairs
rows (E, T, D).sum(0)                     every token for every expert
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dsmoe_compiler.ir.body import Body, Step
from dsmoe_compiler.ir.graph import dtype, same_size, shape
from dsmoe_compiler.ir.reference import evaluate
from dsmoe_compiler.passes.lift.axes import count_tokens
from dsmoe_compiler.passes.lift.dense import as_dense
from dsmoe_compiler.passes.lift.gather import is_pair_shaped
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, Unproven, argument, operator_name
from dsmoe_compiler.passes.lift.values import Combined, Everywhere, Filled, Pairs, Rows, TokenOf, Value

_KEEPS_ZERO = frozenset(
    {"neg", "abs", "sqrt", "erf", "tanh", "relu", "silu", "gelu", "gelu_tanh", "cast", "slice"}
)


def sum_rows(lift: Lift, node: Node) -> Value | None:
    """The sum over a token's slots, or over all experts."""
    rows = lift.rows(node.args[0])
    if rows is None or not lift.terms.leaves(rows.term, "expert"):
        return None
    rank = rows.lead + len(rows.trail)
    dims, keep = [d % rank for d in argument(node, "dim") or []], argument(node, "keepdim")
    term = rows.term
    if (summed := argument(node, "dtype")) is not None:
        term = lift.terms.number("cast", (term,), (str(summed).removeprefix("torch."),))
    if _is_only_slot(rows, dims) and not keep:
        return Combined(rows.like(term, rows.trail[1:]))
    if keep or len(rows.trail) != 1:
        return None
    if isinstance(rows.domain, Everywhere):
        weighed = rows.lead > 1 and dims == [rows.domain.axis] and lift.terms.leaves(term, "pair")
        return Combined(rows.like(term)) if weighed else None
    if not isinstance(rows.domain, Pairs) or rows.lead < 2 or dims != [rows.lead - 1]:
        return None
    return Combined(rows.like(term))


def weighted_sum(lift: Lift, node: Node) -> Value | None:
    """einsum("tk,tkd->td", w, y), w.unsqueeze(1) @ y: each token's rows times their weights, summed."""
    if operator_name(node) == "aten::einsum":
        operands, weights_at = argument(node, "tensors"), _of_einsum(str(argument(node, "equation")))
    else:
        operands, weights_at = list(node.args), 0
        unsqueezed = operands[0]
        assert isinstance(unsqueezed, Node)
        if operator_name(unsqueezed) != "aten::unsqueeze":
            return None
        if argument(unsqueezed, "dim") not in (-2, len(shape(unsqueezed)) - 2):
            return None
        operands[0] = unsqueezed.args[0]
    if weights_at is None or len(operands) != 2:
        return None
    weights, rows = operands[weights_at], lift.rows(operands[1 - weights_at])
    if rows is None or not isinstance(rows.domain, Pairs) or rows.domain.order is not None:
        return None
    if rows.lead < 2 or len(rows.trail) != 1 or not lift.opaque(weights) or len(shape(weights)) != rows.lead:
        return None
    if not is_pair_shaped(weights, rows.domain) or dtype(weights) != dtype(node):
        return None
    return Combined(rows.like(lift.terms.number("mul", (rows.term, lift.pair(PairSource(weights))))))


def dense_sum(lift: Lift, node: Node) -> Value | None:
    """einsum("te,etd->td", dense weights, rows): every expert's rows times their weights, summed."""
    inputs, _, out = str(argument(node, "equation")).replace(" ", "").partition("->")
    names, found = inputs.split(","), [as_dense(lift, o) for o in argument(node, "tensors")]
    if len(found) != 2:
        return None
    at = 0 if len(names[0]) < len(names[1]) else 1
    weights, rows = found[at], found[1 - at]
    if weights is None or rows is None or weights.trail or weights.lead != rows.lead or rows.lead < 2:
        return None
    if not isinstance(rows.domain, Everywhere) or not isinstance(weights.domain, Everywhere):
        return None
    many, few = names[1 - at], names[at]
    if len({*many}) != len(many) or len(many) != rows.lead + 1 or len(few) != rows.lead:
        return None
    tokens = _without(many[:-1], rows.domain.axis)
    if few[weights.domain.axis] != many[rows.domain.axis] or out != tokens + many[-1]:
        return None
    if _without(few, weights.domain.axis) != tokens:
        return None
    if rows.domain.experts != weights.domain.experts or len(rows.trail) != 1:
        return None
    return Combined(rows.like(lift.terms.number("mul", (rows.term, weights.term))))


def _without(names: str, axis: int) -> str:
    return names[:axis] + names[axis + 1 :]


def _of_einsum(equation: str) -> int | None:
    """Which operand of "tk,tkd->td" holds one number a pair; None if it is another equation."""
    inputs, _, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(names) != 2 or abs(len(names[0]) - len(names[1])) != 1:
        return None
    weights_at = 0 if len(names[0]) < len(names[1]) else 1
    weights, rows = names[weights_at], names[1 - weights_at]
    right = len(set(rows)) == len(rows) and weights == rows[:-1] and out == weights[:-1] + rows[-1]
    return weights_at if right and len(weights) > 1 else None


def _is_only_slot(rows: Rows, dims: list[int]) -> bool:
    """Whether rows of top-1, one a token, are summed over the dimension of size 1 that numbers their slot."""
    one = isinstance(rows.domain, Pairs) and rows.domain.slots == 1 and rows.domain.order is None
    return one and dims == [rows.lead] and len(rows.trail) == 2 and rows.trail[0] == 1


def add_by_token(lift: Lift, node: Node) -> Value | None:
    """zeros.index_add(0, tokens, sorted rows)."""
    start, at, rows = lift.of(node.args[0]), lift.of(node.args[2]), lift.rows(node.args[3])
    if rows is None or not isinstance(start, Filled) or argument(node, "dim") != 0:
        return None
    if start.number != 0 or argument(node, "alpha") != 1 or not isinstance(rows.domain, Pairs):
        return None
    if not isinstance(at, TokenOf) or rows.domain.meet(at.domain) != rows.domain:
        raise Unproven("R402", "rows are added at indices that are not their own tokens")
    assert rows.domain.ids is not None
    if rows.lead != 1 or len(rows.trail) != 1 or not same_size(shape(node)[0], count_tokens(rows.domain.ids)):
        return None
    source = node.args[3]
    assert isinstance(source, Node)
    return Combined(rows) if dtype(source) == dtype(node) else None


def require_sparse(lift: Lift, term: int) -> None:
    """Prove that the term is 0 wherever the dense weights hold their number off the ids.

    NaN and infinities apart: 0 · inf is NaN for every token of the dense spelling, none of the sparse one.
    """
    if vanishes(lift, term):
        return
    fills = {lift.sources[str(s.attrs[0])].fill for s in lift.terms.leaves(term, "pair")}
    if fills != {0.0}:
        raise Unproven(
            "R405", "the dense weights are not zero away from the ids: every expert reaches every token"
        )
    raise Unproven(
        "R406", "an expert's output is not zero where its weight is: every expert reaches every token"
    )


def vanishes(lift: Lift, term: int) -> bool:
    """Whether the term is 0 wherever the dense weights hold their number off the ids."""
    step = lift.terms.steps[term]
    constant = _off_ids(lift, term)
    if constant is not None:
        return constant == 0
    match step.op:
        case "mul":
            return any(vanishes(lift, a) for a in step.args)
        case "linear" | "matmul":
            return vanishes(lift, step.args[0])
        case "div":
            return vanishes(lift, step.args[0]) and not vanishes(lift, step.args[1])
        case "add" | "sub" | "concat" | "minimum" | "maximum":
            return all(vanishes(lift, a) for a in step.args)
    return step.op in _KEEPS_ZERO and vanishes(lift, step.args[0])


def _off_ids(lift: Lift, term: int) -> float | None:
    """The number a term of dense weights and constants alone has off the ids; None if it has other leaves."""
    leaves = [lift.terms.steps[t] for t in lift.terms.reachable(term) if not lift.terms.steps[t].args]
    fills: dict[Step, Step] = {}
    for leaf in leaves:
        if leaf.op == "pair" and (fill := lift.sources[str(leaf.attrs[0])].fill) is not None:
            fills[leaf] = Step("const", (), (fill,))
        elif leaf.op != "const":
            return None
    if not fills:
        return None
    body = lift.terms.body(term, {leaf: Step("x") for leaf in fills})
    if len({s.attrs for s in fills.values()}) != 1:
        return None
    number = float(str(next(iter(fills.values())).attrs[0]))
    return float(evaluate(Body(body.steps), torch.tensor([[number]]), None, []).item())


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::sum": (sum_rows,),
    "aten::index_add": (add_by_token,),
    "aten::einsum": (weighted_sum, dense_sum),
    "aten::bmm": (weighted_sum,),
    "aten::matmul": (weighted_sum,),
}
