"""A fused layer on a CPU: rows sorted by expert, one pass over each active expert's weights, nothing
repacked.

T·K pairs are sorted by expert; each expert that received rows runs its body on one contiguous segment, in the
layout the model holds its weights in; the results go back to their pairs' order and are summed per token. An
expert without rows costs nothing. With one token there is nothing to sort.

Shapes: x_TD, ids_TK, weights_TK; P = T·K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.body import Body, Step
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, parse


class CpuExperts(nn.Module):
    """`dsmoe::experts` for one spec, parsed once."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.text, self.spec = spec, parse(spec, ExpertsSpec)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, params: Sequence[Tensor]) -> Tensor:
        """out (T, D); differentiable through the reference where a gradient is wanted."""
        if _wants_gradient(x_TD, weights_TK, *params):
            return ops.EXPERTS(x_TD, ids_TK, weights_TK, params, self.text)  # type: ignore[no-any-return]
        return run_experts(x_TD, ids_TK, weights_TK, params, self.spec)

    def extra_repr(self) -> str:
        return str(self.spec)


class CpuMoE(nn.Module):
    """`dsmoe::moe` for one spec, parsed once."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.text, self.spec = spec, parse(spec, MoESpec)

    def forward(
        self, x_TD: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Tensor:
        """out (T, D); differentiable through the reference where a gradient is wanted."""
        if _wants_gradient(x_TD, *router, *params, *shared):
            return ops.MOE(x_TD, router, params, shared, self.text)  # type: ignore[no-any-return]
        weights_TK, ids_TK = reference.route_tokens(x_TD, router, self.spec)
        out_TD = run_experts(x_TD, ids_TK, weights_TK, params, self.spec.experts)
        if self.spec.shared is None:
            return out_TD
        return out_TD + reference.shared_experts(x_TD, shared, self.spec.shared)

    def extra_repr(self) -> str:
        return str(self.spec)


class CpuRoute(nn.Module):
    """`dsmoe::route` for one spec, parsed once."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = parse(spec, RouterSpec)

    def forward(self, logits_TE: Tensor, selection_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """weights and ids (T, K)."""
        return reference.route(logits_TE, selection_bias, self.spec)


def run_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, params: Sequence[Tensor], spec: ExpertsSpec
) -> Tensor:
    """out (T, D) = Σ_k body(x[t], weights[t,k], P[ids[t,k]]); slots with id −1 add nothing."""
    order_P, segments = _by_expert(ids_TK, spec.count)
    body, weigh_last = _split_weight(spec, x_TD, weights_TK, *params)
    # index_select copies whole rows; indexing with a tensor was eight times slower at 6144 rows of 768.
    x_PD = x_TD.index_select(0, order_P // ids_TK.shape[1])
    w_P1 = weights_TK.reshape(-1, 1).index_select(0, order_P)
    # An expert's vectors (biases) are gathered per row; its matrices stay where they are.
    per_row = [p if p.dim() > 2 else p[ids_TK.reshape(-1)[order_P]] for p in params]

    def grouped(step: Step, rows: Tensor, weight: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], weight.shape[1 if step.op == "linear" else 2])
        for e, start, stop in segments:
            matrix = weight[e].t() if step.op == "linear" else weight[e]
            torch.mm(rows[start:stop], matrix, out=out[start:stop])
        return out

    y_PD = reference.evaluate(body, x_PD, w_P1, per_row, grouped)
    out_TD = _combine(y_PD, order_P, weights_TK if weigh_last else None, *ids_TK.shape)
    return out_TD.to(reference.out_dtype(spec, out_TD.dtype))


def _by_expert(ids_TK: Tensor, experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The pairs in the experts' order, and (expert, first row, row after its last) of every expert that has
    rows.

    Of one token each expert has at most one pair, so its pairs stay as they are.
    """
    flat_ids = ids_TK.reshape(-1)
    if ids_TK.shape[0] == 1:
        ids = flat_ids.tolist()
        if min(ids) >= 0:
            return torch.arange(len(ids), device=ids_TK.device), [(e, k, k + 1) for k, e in enumerate(ids)]
    order_P = flat_ids.argsort(stable=True)
    dropped, *rows_per_expert = torch.bincount(flat_ids + 1, minlength=experts + 1).tolist()
    segments, start = [], 0
    for e, n in enumerate(rows_per_expert):
        if n:
            segments.append((e, start, start + n))
            start += n
    return order_P[dropped:], segments


def _split_weight(spec: ExpertsSpec, *tensors: Tensor) -> tuple[Body, bool]:
    """The body without its final product with the routing weight, if it ends in one of a single dtype."""
    body = spec.body
    last = body.steps[body.result]
    if spec.weighting != "output" or last.op != "mul" or body.steps[last.args[1]].op != "w":
        return body, False
    # The fused weighing sums in fp32; with other dtypes it would round differently from the body's own
    # product.
    if body.uses("cast") or any(t.dtype != torch.float32 for t in tensors):
        return body, False
    return body.upto(last.args[0]), True


def _combine(y_PD: Tensor, order_P: Tensor, weights_TK: Tensor | None, tokens: int, slots: int) -> Tensor:
    """Sorted rows summed per token, slots in order, weighed if `weights_TK` is given."""
    if tokens == 1 and weights_TK is not None and order_P.numel() == slots:
        return weights_TK @ y_PD
    pairs = tokens * slots
    if order_P.numel() < pairs:  # dropped slots point at a row of zeros after the last
        y_PD = torch.cat([y_PD, y_PD.new_zeros(1, y_PD.shape[1])])
    row_of_pair = torch.full((pairs,), order_P.numel(), dtype=order_P.dtype, device=order_P.device)
    row_of_pair[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    if weights_TK is not None:
        return F.embedding_bag(
            row_of_pair.view(tokens, slots), y_PD, mode="sum", per_sample_weights=weights_TK
        )
    return y_PD.index_select(0, row_of_pair).view(tokens, slots, y_PD.shape[1]).sum(1)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
