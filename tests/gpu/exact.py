"""What a layer should give, in float64, and how far from it a kernel may be.

Errors are ‖out − exact‖ / ‖exact‖. A rounding to a dtype with p bits moves every number by at most u = 2⁻ᵖ of
itself (bfloat16: p = 8, float16: 11, float32: 24), so a row by at most u of its length. The kernels round
three times: an expert's hidden row, which a product with random weights carries on at its own relative
length; what it makes of the row; the sum over slots. In between they compute in float32, u₃₂ = 2⁻²⁴: a sum of
n random products is off by about √n u₃₂ of its own size, since every partial sum is of that size at most
and the roundings are independent; four times that for safety. Exponentials, error functions and divisions
add a few u₃₂ each. Hence

    3 u + (4 √max(D, F) + 16) u₃₂

and as much again as the logits' sums, 8 √D u₃₂, where the router's weights are computed, too: what a
softmax makes of an error of its logits is that error, relatively, from numerator and denominator. With
tf32, whose u is 2⁻¹¹, float32 layers would miss this by far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec
from tests.gpu.layers import Layer

_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def assert_near(out: Tensor, exact: Tensor, width: int, routed: bool = False) -> None:
    """Compare a layer's output (T, D) with the float64 one; `width` is F, the widest of shared experts
    included.
    """
    assert out.shape == exact.shape
    assert torch.isfinite(out).all(), f"{int((~torch.isfinite(out)).sum())} of {out.numel()} never written"
    found, allowed = error(out, exact), tolerance(out.dtype, exact.shape[1], width, routed)
    assert found <= allowed, f"off by {found:.2e}, {allowed:.2e} are explained by rounding"
    # One wrong number among many right ones hardly changes that. Of millions of errors none is six times as
    # large as they are on average, which is below what is allowed; and short rows are not all of one length.
    sizes = exact.double().square().mean(-1, keepdim=True).sqrt()
    wrong = (out.double() - exact.double()).abs() > 8 * allowed * sizes
    assert not wrong.any(), f"{int(wrong.sum())} of {out.numel()} are wrong, in rows {_rows(wrong)}"


def _rows(wrong: Tensor) -> list[int]:
    return torch.nonzero(wrong.any(-1)).flatten().tolist()[:8]


def tolerance(dtype: torch.dtype, hidden: int, width: int, routed: bool = False) -> float:
    """The largest error that rounding explains; see above."""
    sums = 4 * math.sqrt(max(hidden, width)) + 16 + (8 * math.sqrt(hidden) if routed else 0)
    return float(3 * 2.0 ** -_BITS[dtype] + sums * 2.0**-24)


def error(out: Tensor, exact: Tensor) -> float:
    """‖out − exact‖ / ‖exact‖; the length of `out` where nothing is expected."""
    length = float(torch.linalg.vector_norm(exact.double()))
    return float(torch.linalg.vector_norm(out.double() - exact.double())) / (length or 1.0)


def experts(layer: Layer) -> Tensor:
    """The experts' output (T, D) in float64, by the reference."""
    params = [p.double() for p in layer.params]
    return reference.experts(
        layer.x.double(), layer.ids, layer.weights.double(), params, _unrounded(layer.spec)
    )


def moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: MoESpec
) -> Tensor:
    """A whole layer's output (T, D) in float64, by the reference."""
    assert spec.router is not None
    exact = replace(spec, experts=_unrounded(spec.experts), router=_unrounded_router(spec.router))
    routers, matrices, always = ([t.double() for t in group] for group in (router, params, shared))
    return reference.moe(x.double(), routers, matrices, always, exact)


def decided(x: Tensor, router: Sequence[Tensor], spec: RouterSpec, margin: float) -> Tensor:
    """Which tokens' experts no rounding of their logits could change (T,): the last selected one, and with
    groups the last selected group, is ahead of the next by more than `margin` of the largest.
    """
    exact = _unrounded_router(spec)
    logits = reference.router_logits(x.double(), [t.double() for t in router], exact)
    scores = logits.softmax(-1) if spec.score == "softmax" else logits.sigmoid()
    ranked = logits if spec.select == "logits" else scores
    if spec.selection_bias:
        ranked = ranked + router[-1].double()
    sure = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if spec.groups > 1:
        members = ranked.view(len(x), spec.groups, ranked.shape[1] // spec.groups)
        best = members.amax(-1) if spec.group_score == "max" else members.topk(2).values.sum(-1)
        sure = _ahead(best, spec.top_groups, margin)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(spec.top_groups).indices, True)
        ranked = members.masked_fill(~chosen.unsqueeze(-1), spec.group_fill).flatten(1)
    return sure & _ahead(ranked, spec.top_k, margin)


def _ahead(values: Tensor, count: int, margin: float) -> Tensor:
    if count == values.shape[1]:
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    best = values.topk(count + 1).values
    return (best[:, -2] - best[:, -1]) > margin * best.abs().amax(1)


def by_token(out: Tensor, expected: Tensor) -> Tensor:
    """Each row's ‖out − expected‖ / ‖expected‖ (rows,), over the last dimension."""
    difference = torch.linalg.vector_norm(out.double() - expected.double(), dim=-1)
    lengths = torch.linalg.vector_norm(expected.double(), dim=-1)
    return torch.flatten(difference / lengths)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and of integers the largest: what nobody wrote shows, read or returned."""
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


def _unrounded(spec: ExpertsSpec) -> ExpertsSpec:
    return replace(spec, out_dtype=None)


def _unrounded_router(spec: RouterSpec) -> RouterSpec:
    return replace(spec, logits_dtype=None, score_dtype=None, weight_dtype=None)
