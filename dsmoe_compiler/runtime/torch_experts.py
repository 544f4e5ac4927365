"""Routed experts by torch's operators: one pass over each active expert's weights, where and as the model
holds them. This runs where there are no native kernels, and what they do not know.

T·K pairs are sorted by expert, so that each expert's rows are one contiguous segment. A few hundred rows at a
time run through the body, each matrix product once per active expert and everything else once over them all,
and are added to their tokens while they are in the cache. An expert without rows costs nothing. With one
token there is nothing to sort.

Shapes: x_TD, ids_TK, weights_TK; P = T·K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.body import Step
from dsmoe_compiler.ir.spec import ExpertsSpec

# (expert, its first row, the row after its last)
_Segment: TypeAlias = tuple[int, int, int]
_ROWS = 512  # rows that run through the body together
_FEW = 64  # up to so many bfloat16 rows, the matrix is a GEMM's first operand: 1.2 to 1.4 times faster


def run_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, params: Sequence[Tensor], spec: ExpertsSpec
) -> Tensor:
    """out (T, D) = Σ_k body(x[t], weights[t,k], P[ids[t,k]]); slots with id −1 add nothing."""
    tokens, slots = ids_TK.shape
    order_P, segments = _by_expert(ids_TK, spec.count)
    flat_ids, flat_w = ids_TK.reshape(-1), weights_TK.reshape(-1, 1)
    if not segments:
        width, dtype = reference.row_shape(spec, x_TD, weights_TK, params)
        return x_TD.new_zeros(tokens, width, dtype=reference.out_dtype(spec, dtype))
    out_TD: Tensor | None = None
    for run in _cache_sized(segments):
        pairs = order_P if len(run) == len(segments) else order_P[run[0][1] : run[-1][2]]
        # index_select copies whole rows; indexing with a tensor was eight times slower at 6144 rows of 768.
        x = x_TD.expand(len(pairs), -1) if tokens == 1 else x_TD.index_select(0, pairs // slots)
        # An expert's vectors (biases) are gathered per row; its matrices stay where they are.
        per_row = [p if p.dim() > 2 else _vectors(p, flat_ids, pairs) for p in params]
        y = reference.evaluate(spec.body, x, flat_w.index_select(0, pairs), per_row, _Grouped(run))
        # Summed while the rows are in the cache: a buffer for all P of them is fresh pages at every call.
        summed = torch.promote_types(y.dtype, torch.float32)
        if tokens == 1:
            total = y.sum(0, keepdim=True, dtype=summed)
            out_TD = total if out_TD is None else out_TD + total
            continue
        if out_TD is None:
            out_TD = y.new_zeros(tokens, y.shape[1], dtype=summed)
        out_TD.index_add_(0, pairs // slots, y.to(summed))
    assert out_TD is not None
    return out_TD.to(reference.out_dtype(spec, y.dtype))


def _vectors(vectors: Tensor, flat_ids: Tensor, pairs: Tensor) -> Tensor:
    """Each row's vector (P, width), or the one that all experts share (1, width)."""
    return vectors[:1] if vectors.stride(0) == 0 else vectors[flat_ids[pairs]]


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
        if weight.stride(0) == 0:  # one matrix that all experts share
            return torch.mm(rows, weight[0].t() if transposed else weight[0])
        out = rows.new_empty(rows.shape[0], weight.shape[1 if transposed else 2])
        first = self.segments[0][1]
        for e, start, stop in self.segments:
            matrix, start, stop = weight[e], start - first, stop - first
            matrix = matrix if transposed else matrix.t()
            if stop - start == 1 and transposed and rows.dtype != torch.float16:
                # Reads a row-major matrix faster: by 1.5 in bfloat16; slower in float16, by 1.7.
                torch.mv(matrix, rows[start], out=out[start])
            elif rows.dtype == torch.bfloat16 and stop - start <= _FEW:
                # oneDNN repacks its second operand at every call: the few rows, then, not the matrix.
                out[start:stop] = torch.mm(matrix, rows[start:stop].t()).t()
            else:
                torch.mm(rows[start:stop], matrix.t(), out=out[start:stop])
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
