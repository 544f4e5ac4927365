"""Routed experts as sorted rows, cut into a part an expert: what standard ONNX runs fastest.

The pairs (token, slot) are sorted by expert, their tokens' rows gathered, and every product of the body is
one matrix product an expert on its part of the rows; all else of the body runs on all rows at once. A body
travels through torch's exporter with operators of our own in it, and comes out of `lower` as standard ones:

    dsmoe::Sort(ids (P))                   -> tokens (P), slots (P), experts (P), inverse (P), counts (groups)
    dsmoe::GroupedMatMul(rows (P, n), counts (groups), weights (E, …)) -> (P, m)
    dsmoe::Rows(values (N, n), places (P)) -> (P, n)
    dsmoe::WeightedSum(y (T, K, n), weights (T, K)) -> (T, n)

P = T·K; there is a group an expert, and one before them for dropped pairs where `drops` says there may be
any.
Shapes: x_TD, ids_TK, weights_TK.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out

from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.body import GEMMS, Body, Step, Terms

SORT, GROUPED_MATMUL = "dsmoe::Sort", "dsmoe::GroupedMatMul"
# ATen has these, and torch's translation of each is several nodes more than it takes.
ROWS, WEIGHTED_SUM = "dsmoe::Rows", "dsmoe::WeightedSum"


class NotSplit(Exception):
    """Why a body cannot be computed on rows sorted by expert."""


def split_form(layer: Experts) -> Form:
    """What `dsmoe::experts` computes of a layer. Raises NotSplit for a body whose matrices are computed."""
    matrices = _matrices(layer.spec.body)
    if any(p.dim() > 2 for i, p in enumerate(layer.params) if i not in matrices):
        raise NotSplit("an expert's matrix is read as its numbers")
    return lambda x_TD, ids_TK, weights_TK, params: _computed(
        x_TD, ids_TK, weights_TK, params, layer, matrices
    )


def _computed(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    params: Sequence[Tensor],
    layer: Experts,
    matrices: Collection[int],
) -> Tensor:
    spec, drops = layer.spec, layer.routing.drops
    tokens, slots = ids_TK.shape
    pairs = tokens * slots
    token_P, slot_P, expert_P, inverse_P, counts = symbolic_multi_out(
        SORT,
        [ids_TK.to(torch.int64).reshape(-1)],
        {"experts": spec.count, "slots": slots, "drops": int(drops), "layer": layer.number},
        dtypes=[torch.int64] * 5,
        shapes=[*[(pairs,)] * 4, (spec.count + drops,)],
        version=1,
    )

    def multiply(step: Step, rows: Tensor, stack: Tensor) -> Tensor:
        transposed = step.op == "linear"  # a matrix (out, in)
        return symbolic(
            GROUPED_MATMUL,
            [rows, counts, stack],
            {"transposed": int(transposed), "drops": int(drops)},
            dtype=rows.dtype,
            shape=(pairs, stack.shape[1 if transposed else 2]),
            version=1,
        )

    if drops:
        is_kept_P1, expert_P = (expert_P >= 0).unsqueeze(1), expert_P.clamp(min=0)
    rows_PD = _rows(x_TD, token_P)
    rows_P1 = _rows(weights_TK.reshape(-1, 1), slot_P)
    values = [
        p if i in matrices else _rows(p.unsqueeze(1) if p.dim() == 1 else p, expert_P)
        for i, p in enumerate(params)
    ]
    weighted, body = _without_weight(spec.body)
    y_PD = reference.evaluate(body, rows_PD, rows_P1, values, multiply)
    if weighted and (drops or y_PD.dtype != weights_TK.dtype):
        weighted, y_PD = False, y_PD * rows_P1
    if drops:
        y_PD = torch.where(is_kept_P1, y_PD, 0.0)
    y_TKD = _rows(y_PD, inverse_P).view(tokens, slots, y_PD.shape[1])
    y_TD = _weighted_sum(y_TKD, weights_TK) if weighted else y_TKD.sum(1)
    return y_TD.to(reference.out_dtype(spec, y_TD.dtype))


def _matrices(body: Body) -> set[int]:
    """The parameters that are matrices of products. Raises NotSplit."""
    found, elsewhere = set[int](), set[int]()
    for step in body.steps:
        for place, at in enumerate(step.args):
            operand = body.steps[at]
            if step.op in GEMMS and place == 1:
                if operand.op != "p":
                    raise NotSplit("a product's matrix is computed from an expert's tensors")
                found.add(int(operand.attrs[0] or 0))
            elif operand.op == "p":
                elsewhere.add(int(operand.attrs[0] or 0))
    if found & elsewhere:
        raise NotSplit("an expert's matrix is also read as its numbers")
    return found


def _rows(values: Tensor, places_P: Tensor) -> Tensor:
    """The rows at these places, (P, n)."""
    shape = (places_P.shape[0], values.shape[1])
    return symbolic(ROWS, [values, places_P], dtype=values.dtype, shape=shape, version=1)


def _weighted_sum(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    shape = (y_TKD.shape[0], y_TKD.shape[2])
    return symbolic(WEIGHTED_SUM, [y_TKD, weights_TK], dtype=y_TKD.dtype, shape=shape, version=1)


def _without_weight(body: Body) -> tuple[bool, Body]:
    """Whether the last step multiplies a row with its weight and no other step reads that, and the body
    before it: the weights can then sum the slots in one product. Else False and the whole body.
    """
    *steps, last = body.steps
    reads_weight = [i for i, step in enumerate(steps) if any(steps[a].op == "w" for a in step.args)]
    if last.op != "mul" or reads_weight or steps[last.args[1]].op != "w":
        return False, body
    terms, number = Terms(), list[int]()
    for step in steps:
        number.append(terms.number(step.op, tuple(number[a] for a in step.args), step.attrs))
    return True, terms.body(number[last.args[0]], {})
