"""The maths of every spec in plain torch: the oracle that each backend and each rewrite is held against.

Shapes: x_TD, logits_TE, weights_TK, ids_TK (−1: dropped), expert parameters E first, in the layout the spec
says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_compiler.ir.body import Body, Step
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec

Operand = Tensor | float | int


def _layer_norm(a: Tensor, weight: Operand, bias: Operand, eps: float) -> Tensor:
    """`aten.layer_norm` over the width, rounded to a's dtype once, at the end, as torch's kernels do."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    return (F.layer_norm(wide, a.shape[-1:], eps=eps) * weight + bias).to(a.dtype)


def _group_norm(a: Tensor, weight: Operand, bias: Operand, groups: int, eps: float) -> Tensor:
    """`aten.group_norm` of rows, their width in groups, rounded to a's dtype once."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    return (F.group_norm(wide, groups, eps=eps) * weight + bias).to(a.dtype)


def _rms_norm(a: Tensor, weight: Operand, eps: float | None) -> Tensor:
    """`aten.rms_norm` over the width, rounded to a's dtype once; without an eps, that of the wider dtype."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(a.dtype)


# What each operator does to rows (n, width) on one expert's parameters.
_TORCH: dict[str, Callable[..., Operand]] = {
    "linear": F.linear,
    "matmul": torch.matmul,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "power": torch.pow,
    "add_scaled": lambda a, b, alpha: torch.add(a, b, alpha=alpha),
    "lerp": torch.lerp,
    "addcmul": lambda a, b, c, value: torch.addcmul(a, b, c, value=value),
    "addcdiv": lambda a, b, c, value: torch.addcdiv(a, b, c, value=value),
    "concat": lambda a, b: torch.cat([a, b], -1),
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "mish": F.mish,
    "selu": F.selu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "elu": torch.ops.aten.elu,
    "celu": F.celu,
    "threshold": F.threshold,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "nan_to_num": torch.nan_to_num,
    "pow": torch.pow,
    "clamp": torch.clamp,
    "cast": lambda a, dtype: a.to(getattr(torch, dtype)),
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_not": torch.logical_not,
    "where": torch.where,
    "sum": lambda a: a.sum(-1, keepdim=True),
    "mean": lambda a: a.mean(-1, keepdim=True),
    "amax": lambda a: a.amax(-1, keepdim=True),
    "amin": lambda a: a.amin(-1, keepdim=True),
    "logsumexp": lambda a: a.logsumexp(-1, keepdim=True),
    "norm": lambda a, order: torch.linalg.vector_norm(a, order, -1, keepdim=True),
    "var": lambda a, correction: a.var(-1, correction=correction, keepdim=True),
    "std": lambda a, correction: a.std(-1, correction=correction, keepdim=True),
    "slice": lambda a, start, stop, step: a[..., start:stop:step],
    "expand": lambda a, width: a.expand(*a.shape[:-1], width),
    "glu": F.glu,
    "softmax": lambda a: a.softmax(-1),
    "log_softmax": lambda a: a.log_softmax(-1),
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
}


def evaluate(
    body: Body,
    x: Tensor,
    w: Tensor | None,
    params: Sequence[Tensor],
    gemm: Callable[[Step, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The body's value for rows x (n, D) and w (n, 1), all of one expert whose tensors are `params`.

    `gemm`, if given, computes the linear and matmul steps instead (for other weight arrangements).
    """
    values: list[Operand] = []
    for step in body.steps:
        args = [values[a] for a in step.args]
        if step.op == "x":
            value: Operand = x
        elif step.op == "w":
            assert w is not None, "this body weighs its rows"
            value = w
        elif step.op == "p":
            value = params[int(step.attrs[0] or 0)]
        elif step.op == "const":
            value = step.attrs[0]  # type: ignore[assignment]
        elif gemm and step.op in ("linear", "matmul"):
            value = gemm(step, *args)  # type: ignore[arg-type]
        else:
            value = _TORCH[step.op](*args, *step.attrs)
        values.append(value)
    result = values[-1]
    assert isinstance(result, Tensor)
    return result


def row_shape(
    spec: ExpertsSpec, x: Tensor, weights: Tensor, params: Sequence[Tensor]
) -> tuple[int, torch.dtype]:
    """The width and dtype of the body's rows, found on zero rows of the meta device."""

    def empty(t: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=t.dtype, device="meta")

    row = evaluate(
        spec.body, empty(x, 1, spec.hidden), empty(weights, 1, 1), [empty(p, *p.shape[1:]) for p in params]
    )
    return int(row.shape[-1]), row.dtype


def out_dtype(spec: ExpertsSpec, summed: torch.dtype) -> torch.dtype:
    """The dtype of the layer's output, given that of its rows."""
    return getattr(torch, spec.out_dtype) if spec.out_dtype else summed


def experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, params: Sequence[Tensor], spec: ExpertsSpec
) -> Tensor:
    """out[t] = Σ_k body(x[t], weights[t,k], P[ids[t,k]]), one expert at a time; id −1 adds nothing."""
    tokens, slots = ids_TK.shape
    width, dtype = row_shape(spec, x_TD, weights_TK, params)
    y_PD = x_TD.new_zeros(tokens * slots, width, dtype=dtype)
    flat_ids, flat_w = ids_TK.reshape(-1), weights_TK.reshape(-1, 1)
    for e in sorted(set(flat_ids.tolist())):
        if e >= 0:
            pairs = torch.nonzero(flat_ids == e).squeeze(1)
            y = evaluate(spec.body, x_TD[pairs // slots], flat_w[pairs], [p[e] for p in params])
            y_PD = y_PD.index_copy(0, pairs, y)
    return y_PD.view(tokens, slots, width).sum(1).to(out_dtype(spec, dtype))


def router_logits(x_TD: Tensor, router: Sequence[Tensor], spec: RouterSpec) -> Tensor:
    """logits (T, E) = x · Wᵀ (+ b), in `logits_dtype`."""
    weight, bias = router[0], router[1] if spec.logits_bias else None
    if spec.logits_dtype:
        dtype = getattr(torch, spec.logits_dtype)
        x_TD, weight, bias = x_TD.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(x_TD, weight, bias)


def route(logits_TE: Tensor, selection_bias: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """weights (T, K) and ids (T, K) int64, best first."""
    if spec.score_dtype and spec.select == "scores":
        logits_TE = logits_TE.to(getattr(torch, spec.score_dtype))
    if spec.select == "logits":
        selected_TK, ids_TK = logits_TE.topk(spec.top_k, dim=-1)
        if spec.score_dtype:
            selected_TK = selected_TK.to(getattr(torch, spec.score_dtype))
        weights_TK = _score(selected_TK, spec)
    else:
        scores_TE = _score(logits_TE, spec)
        ranked_TE = scores_TE if selection_bias is None else scores_TE + selection_bias
        weights_TK, ids_TK = _limit_to_groups(ranked_TE, spec).topk(spec.top_k, dim=-1)
        if spec.weigh == "scores":
            weights_TK = scores_TE.gather(-1, ids_TK)
    if spec.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + spec.epsilon)
    if spec.scale != 1.0:
        weights_TK = weights_TK * spec.scale
    return (weights_TK.to(getattr(torch, spec.weight_dtype)) if spec.weight_dtype else weights_TK), ids_TK


def shared_experts(x_TD: Tensor, params: Sequence[Tensor], spec: SharedSpec) -> Tensor:
    """The shared experts' output (T, D)."""
    return evaluate(spec.body, x_TD, None, params)


def moe(
    x_TD: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: MoESpec
) -> Tensor:
    """The whole layer, (T, D) to (T, D): route, run the experts, add the shared experts."""
    weights_TK, ids_TK = route_tokens(x_TD, router, spec)
    out_TD = experts(x_TD, ids_TK, weights_TK, params, spec.experts)
    return out_TD + shared_experts(x_TD, shared, spec.shared) if spec.shared else out_TD


def route_tokens(x_TD: Tensor, router: Sequence[Tensor], spec: MoESpec) -> tuple[Tensor, Tensor]:
    """weights and ids (T, K) of a layer whose router is part of its spec."""
    if spec.router is None:
        raise ValueError("dsmoe::moe needs a router in its spec; dsmoe::experts takes ids and weights")
    bias = router[-1] if spec.router.selection_bias else None
    return route(router_logits(x_TD, router, spec.router), bias, spec.router)


def _score(logits: Tensor, spec: RouterSpec) -> Tensor:
    return logits.softmax(-1) if spec.score == "softmax" else logits.sigmoid()


def _limit_to_groups(ranked_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Scores outside the best groups replaced by `group_fill` (DeepSeek-V2 §2.2, DeepSeek-V3 §2.1.2)."""
    if spec.groups == 1:
        return ranked_TE
    tokens, count = ranked_TE.shape
    grouped = ranked_TE.view(tokens, spec.groups, count // spec.groups)
    best = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(
        1, best.topk(spec.top_groups, dim=-1).indices, True
    )
    return grouped.masked_fill(~kept.unsqueeze(-1), spec.group_fill).view(tokens, count)
