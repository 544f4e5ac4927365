"""Fused experts as an uninterpreted function, for checking what surrounds them.

A pass that moves a router or shared experts into the op leaves the experts as they are: whatever they
compute, both sides compute it. So both sides may use any function of (x, ids, weights) in their place, as
long as different experts, tensors or specs get different functions. This one costs a few operations instead
of E matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Tensor

from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse, to_text


def experts(salt: str) -> Callable[..., Tensor]:
    """`dsmoe::experts` standing for the tensors called `salt`."""

    def run(x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: str) -> Tensor:
        return _opaque(x, ids, weights, params, parse(spec, ExpertsSpec), salt)

    return run


def moe(salt: str) -> Callable[..., Tensor]:
    """`dsmoe::moe` with its own router and shared experts, around experts standing for the tensors called
    `salt`.
    """

    def run(
        x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: str
    ) -> Tensor:
        layer = parse(spec, MoESpec)
        weights, ids = reference.route_tokens(x, router, layer)
        out = _opaque(x, ids, weights, params, layer.experts, salt)
        return out + reference.shared_experts(x, shared, layer.shared) if layer.shared else out

    return run


STAND_INS: dict[torch._ops.OpOverload, Callable[[str], Callable[..., Tensor]]] = {
    ops.EXPERTS: experts,
    ops.MOE: moe,
}


def _opaque(
    x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: ExpertsSpec, salt: str
) -> Tensor:
    """Σ_k w[t,k] · g(ids[t,k]) · h(x[t]) in every column, g and h fixed by the salt and the spec."""
    width, dtype = reference.row_shape(spec, x, weights, params)
    phase = crc32(f"{salt} {to_text(spec)}".encode()) % 1000 / 1000
    per_expert = torch.sin(12.9898 * (ids.double() + 1) + phase)
    per_token = (weights.double() * per_expert).sum(-1, keepdim=True) * x.double().sum(-1, keepdim=True)
    columns = torch.cos(torch.arange(width, dtype=torch.float64, device=x.device) + phase)
    return (per_token * columns).to(reference.out_dtype(spec, dtype))
