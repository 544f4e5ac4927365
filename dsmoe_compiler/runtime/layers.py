"""A fused layer as code generation sees it, made of its spec and of how its tensors lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.operand import Operand
from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse


def operand(tensor: Tensor) -> Operand:
    """How a tensor lies; one of the meta device as if it began at 16 bytes."""
    aligned = tensor.is_meta or tensor.data_ptr() % 16 == 0
    return Operand(tuple(tensor.shape), tuple(tensor.stride()), _name(tensor.dtype), aligned)


def experts_layer(x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: str) -> Layer:
    """The layer of a `dsmoe::experts` with these arguments, of which only shapes, strides and dtypes are
    read.
    """
    layer = parse(spec, ExpertsSpec)
    row = reference.row_shape(layer, x, weights, params)[1]
    return Layer(
        top_k=ids.shape[1],
        experts=layer,
        params=tuple(map(operand, params)),
        x=_name(x.dtype),
        weights=_name(weights.dtype),
        row=_name(row),
        out=_name(reference.out_dtype(layer, row)),
    )


def moe_layer(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: str
) -> Layer:
    """The layer of a `dsmoe::moe` with these arguments, of which only shapes, strides and dtypes are read."""
    layer = parse(spec, MoESpec)
    token = torch.empty(1, x.shape[1], dtype=x.dtype, device="meta")
    routers, experts, always = ([p.to("meta") for p in group] for group in (router, params, shared))
    weights, _ = reference.route_tokens(token, routers, layer)
    row = reference.row_shape(layer.experts, token, weights, experts)[1]
    return Layer(
        top_k=layer.top_k,
        experts=layer.experts,
        params=tuple(map(operand, params)),
        x=_name(x.dtype),
        weights=_name(weights.dtype),
        row=_name(row),
        out=_name(ops.MOE(token, routers, experts, always, spec).dtype),
        router=layer.router,
        router_params=tuple(map(operand, router)),
        shared=layer.shared,
        shared_params=tuple(map(_as_one_expert, shared)),
    )


def _as_one_expert(tensor: Tensor) -> Operand:
    """Shared experts' matrices as those of one expert; a vector needs no stride from expert to expert."""
    whole = operand(tensor.unsqueeze(0))
    return whole if tensor.dim() > 1 else replace(whole, strides=(0, *whole.strides[1:]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
