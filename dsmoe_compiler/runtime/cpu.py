"""A fused layer on a CPU: rows sorted by expert, one pass over each active expert's weights, nothing
repacked.

T·K pairs are sorted by expert; each expert that received rows runs its body on one contiguous segment, in the
layout the model holds its weights in; the results go back to their pairs' order and are summed per token. An
expert without rows costs nothing. With one token there is nothing to sort.

Shapes: x_TD, ids_TK, weights_TK; P = T·K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.body import Step
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, parse

# (expert, its first row, the row after its last)
_Segment: TypeAlias = tuple[int, int, int]
_ROWS = 256  # rows that run through the body together


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
        # One token as a vector: a matrix-vector product reads the weights faster.
        rows = x_TD[0] if x_TD.shape[0] == 1 else x_TD
        return out_TD + reference.shared_experts(rows, shared, self.spec.shared)

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
    tokens, slots = ids_TK.shape
    order_P, all_segments = _by_expert(ids_TK, spec.count)
    # Where the product with the weight is fp32 anyway, one pass over the rows weighs, reorders and sums them;
    # in a narrower dtype it would round differently from the body.
    sums_fp32 = weights_TK.dtype == torch.float32 and all(t.dtype.itemsize <= 4 for t in (x_TD, *params))
    unweighted = spec.unweighted if sums_fp32 else None
    body, flat_ids, flat_w = unweighted or spec.body, ids_TK.reshape(-1), weights_TK.reshape(-1, 1)
    groups = []
    for segments in _cache_sized(all_segments):
        pairs = order_P[segments[0][1] : segments[-1][2]]
        # index_select copies whole rows; indexing with a tensor was eight times slower at 6144 rows of 768.
        x = x_TD.expand(len(pairs), -1) if tokens == 1 else x_TD.index_select(0, pairs // slots)
        w = None if unweighted else flat_w.index_select(0, pairs)
        # An expert's vectors (biases) are gathered per row; its matrices stay where they are.
        per_row = [p if p.dim() > 2 else p[flat_ids[pairs]] for p in params]
        groups.append(reference.evaluate(body, x, w, per_row, _Grouped(segments)))
    if not groups:
        width, dtype = reference.row_shape(spec, x_TD, weights_TK, params)
        return x_TD.new_zeros(tokens, width, dtype=reference.out_dtype(spec, dtype))
    y_PD = groups[0] if len(groups) == 1 else torch.cat(groups)
    if unweighted:
        y_PD = y_PD.float()
    out_TD = _combine(y_PD, order_P, weights_TK if unweighted else None, tokens, slots)
    return out_TD.to(reference.out_dtype(spec, out_TD.dtype))


def _cache_sized(segments: list[_Segment]) -> Iterator[list[_Segment]]:
    """The segments in runs of a few hundred rows, whose intermediates stay in a core's cache."""
    run: list[_Segment] = []
    for segment in segments:
        if run and segment[2] - run[0][1] > _ROWS:
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


@dataclass(frozen=True)
class _Grouped:
    """A GEMM step of the body: each active expert's matrix with its segment of the rows, read where it
    lies.
    """

    segments: list[_Segment]

    def __call__(self, step: Step, rows: Tensor, weight: Tensor) -> Tensor:
        """rows (P, in) and weight (E, out, in), or (E, in, out) for "matmul", to (P, out)."""
        transposed = step.op == "linear"
        out = rows.new_empty(rows.shape[0], weight.shape[1 if transposed else 2])
        first = self.segments[0][1]
        for e, start, stop in self.segments:
            matrix, start, stop = weight[e], start - first, stop - first
            if (
                stop - start == 1
            ):  # a matrix-vector product reads the matrix faster: by 1.2 in fp32, 1.6 in bf16
                torch.mv(matrix if transposed else matrix.t(), rows[start], out=out[start])
            else:
                torch.mm(rows[start:stop], matrix.t() if transposed else matrix, out=out[start:stop])
        return out


def _by_expert(ids_TK: Tensor, experts: int) -> tuple[Tensor, list[_Segment]]:
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
