"""Routed experts as onnxruntime's `com.microsoft::MoE` routes them: by logits, not by ids and weights.

The kernel takes a softmax of a token's logits, its K largest, and divides those by their sum. So ids and
weights become the logits `log(weight)`, all others far below them, and what comes out is multiplied by the
sum of the token's weights: any weights that are not negative, of experts that differ, come back as they
were. (Without the division by the sum, the kernel gives zeros in some graphs.)

Numbers, K=2 of 4 experts:
    ids [2, 0], weights [0.6, 0.2]  ->  logits [log 0.2, −1e4, log 0.6, −1e4], sum 0.8
    the kernel: softmax [0.25, 0, 0.75, 0], its two largest [0.75, 0.25]; times 0.8: [0.6, 0.2]

A dropped pair (id −1) has weight 0 and a column of its own, which is cut off. A token with no expert left
weighs experts by whatever numbers (they are finite) and sums to 0.
Shapes: x_TD, ids_TK, weights_TK, logits_TE.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from dsmoe_compiler.export.onnx.contrib_ffn import Weighs
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.spec import ExpertsSpec, to_text

MOE = "dsmoe::MoE"
# Below the smallest weight's logarithm by more than float32's exponentials reach, and finite: a softmax of
# nothing but infinities is no number.
_FAR_BELOW, _LEAST = -1e4, torch.finfo(torch.float32).tiny


def moe_form(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    params: Sequence[Tensor],
    spec: ExpertsSpec,
    weighs: Weighs,
    *,
    layer: int,
    drops: bool,
) -> Tensor:
    """What `dsmoe::experts` computes, (T, D), with one `dsmoe::MoE(x, logits, params…)` of attributes
    `layer`, `slots` (K) and `experts` (the spec's text). `drops`: ids may be −1.
    """
    slots = ids_TK.shape[1]
    weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    if weighs == "x":
        assert slots == 1, "one row a token cannot be multiplied by several weights"
        x_TD = x_TD * weights_TK
    if weighs != "output":
        weights_TK = torch.ones_like(weights_TK)
    logits_TE, sum_T1 = _as_logits(ids_TK.to(torch.int64), weights_TK, spec.count, drops)
    x_TD = x_TD.to(torch.float32)
    y_TD = symbolic(
        MOE,
        [x_TD, logits_TE, *params],
        {"layer": layer, "slots": slots, "experts": to_text(spec)},
        dtype=torch.float32,
        shape=x_TD.shape,
        version=1,
    )
    y_TD = y_TD * sum_T1
    return y_TD.to(reference.out_dtype(spec, y_TD.dtype))


def _as_logits(ids_TK: Tensor, weights_TK: Tensor, experts: int, drops: bool) -> tuple[Tensor, Tensor]:
    """The logits that are routed as these ids and weights are, (T, E), and the sums of weights, (T, 1)."""
    tokens, slots = ids_TK.shape
    if drops:
        is_kept = ids_TK >= 0
        weights_TK = torch.where(is_kept, weights_TK, 0.0)
        ids_TK = torch.where(is_kept, ids_TK, experts)
    # Of one slot every logit is the largest, whatever its weight.
    logs_TK = weights_TK.to(torch.float32)
    logs_TK = torch.zeros_like(logs_TK) if slots == 1 else logs_TK.clamp(min=_LEAST).log()
    far_below = torch.full((tokens, experts + drops), _FAR_BELOW, device=ids_TK.device)
    logits = far_below.scatter(1, ids_TK, logs_TK)
    return logits[:, :experts] if drops else logits, weights_TK.sum(1, keepdim=True)
