"""The ops spelled in plain ATen, traceable with symbolic sizes: each pair gathers its expert's weights.

Memory grows with T·K weights, so this is for export and inspection, never for speed:

    program = program.run_decompositions(DECOMPOSITIONS)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.body import Step
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, parse


def experts(x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: str) -> Tensor:
    """`dsmoe::experts` as gathers and batched matrix products."""
    return _experts(x, ids, weights, params, parse(spec, ExpertsSpec))


def route(logits: Tensor, selection_bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """`dsmoe::route` as scores, top-k and gathers."""
    return reference.route(logits, selection_bias, parse(spec, RouterSpec))


def pack(parts: Sequence[Tensor]) -> Tensor:
    """`dsmoe::pack` as a stack."""
    return torch.stack(list(parts))


def moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: str
) -> Tensor:
    """`dsmoe::moe` as a router, `experts` and the shared experts."""
    layer = parse(spec, MoESpec)
    weights, ids = reference.route_tokens(x, router, layer)
    out = _experts(x, ids, weights, params, layer.experts)
    return out + reference.shared_experts(x, shared, layer.shared) if layer.shared else out


def _experts(x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: ExpertsSpec) -> Tensor:
    tokens, slots = ids.shape
    pairs = ids.reshape(-1)
    kept = pairs.clamp(min=0)

    def gemm(step: Step, rows: Tensor, weight: Tensor) -> Tensor:
        column = rows.unsqueeze(-1)
        product = weight @ column if step.op == "linear" else weight.transpose(-1, -2) @ column
        return product.squeeze(-1)

    rows = x.unsqueeze(1).expand(tokens, slots, x.shape[1]).reshape(tokens * slots, x.shape[1])
    y = reference.evaluate(spec.body, rows, weights.reshape(-1, 1), [p[kept] for p in params], gemm)
    y = torch.where((pairs >= 0).unsqueeze(-1), y, torch.zeros_like(y))
    summed = y.view(tokens, slots, y.shape[-1]).sum(1)
    return summed.to(reference.out_dtype(spec, summed.dtype))


DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., object]] = {
    ops.MOE: moe,
    ops.EXPERTS: experts,
    ops.ROUTE: route,
    ops.PACK: pack,
}
