"""A fused layer by the Triton kernels that are generated for it: on a GPU, or interpreted on CPU tensors.

Two operators launch them, opaque to `torch.compile` and to CUDA graphs' capture:

    dsmoe::generated_experts(Tensor x, Tensor ids, Tensor weights, Tensor[] params, str spec) -> Tensor
    dsmoe::generated_moe    (Tensor x, Tensor[] router, Tensor[] params, Tensor[] shared, str spec) -> Tensor

A module of kernels is made at the first call for a layout of the tensors and a bucket of tokens, and kept. A
layer that has no kernels runs by the reference, and a warning says once why. Shapes as in `ir.ops`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_compiler.codegen.choice import choice_of, interpreted
from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.codegen.gpu import Gpu, of_device
from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.plan import bucket
from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse
from dsmoe_compiler.runtime.layers import experts_layer, moe_layer


class GeneratedExperts(nn.Module):
    """`dsmoe::experts` for one spec."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, params: Sequence[Tensor]) -> Tensor:
        """out (T, D); differentiable through the reference where a gradient is wanted."""
        if _wants_gradient(x_TD, weights_TK, *params):
            return ops.EXPERTS(x_TD, ids_TK, weights_TK, params, self.spec)  # type: ignore[no-any-return]
        return EXPERTS(x_TD, ids_TK, weights_TK, params, self.spec)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return str(parse(self.spec, ExpertsSpec))


class GeneratedMoE(nn.Module):
    """`dsmoe::moe` for one spec."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self, x_TD: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Tensor:
        """out (T, D); differentiable through the reference where a gradient is wanted."""
        if _wants_gradient(x_TD, *router, *params, *shared):
            return ops.MOE(x_TD, router, params, shared, self.spec)  # type: ignore[no-any-return]
        return MOE(x_TD, router, params, shared, self.spec)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return str(parse(self.spec, MoESpec))


def _experts(x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: str) -> Tensor:
    made = _made(spec, x, (weights, ids), params, lambda: experts_layer(x, ids, weights, params, spec))
    if made is None:
        return ops.EXPERTS(x, ids, weights, params, spec)  # type: ignore[no-any-return]
    with _on(x.device):
        return made.run(x=x.contiguous(), ids=_signed(ids), weights=weights.contiguous(), params=params)


def _moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: str
) -> Tensor:
    tensors = (*router, *params, *shared)
    made = _made(spec, x, (), tensors, lambda: moe_layer(x, router, params, shared, spec))
    if made is None:
        return ops.MOE(x, router, params, shared, spec)  # type: ignore[no-any-return]
    given: dict[str, Any] = {"x": x.contiguous(), "params": params}
    layer = parse(spec, MoESpec)
    if made.routes:
        given["router"] = [t.contiguous() for t in router]
    else:
        weights, ids = reference.route_tokens(x, router, layer)
        given |= {"ids": ids.contiguous(), "weights": weights.contiguous()}
    if layer.shared and made.adds:
        given["added"] = reference.shared_experts(x, shared, layer.shared).contiguous()
    elif layer.shared:
        given["shared"] = shared
    with _on(x.device):
        return made.run(**given)


@dataclass(frozen=True)
class _Made:
    """A module's host function; whether it routes, or is given ids and weights; whether it adds what it is
    given as the shared experts' output.
    """

    run: Callable[..., Tensor]
    routes: bool
    adds: bool


_MADE: dict[tuple[object, ...], _Made | None] = {}


def _made(
    spec: str, x: Tensor, rows: Sequence[Tensor], tensors: Sequence[Tensor], layer: Callable[[], Layer]
) -> _Made | None:
    """The kernels for tensors that lie like these and for as many tokens; None for a layer that has none.

    `rows` are the tensors with a row a token beside x, whose sizes do not matter.
    """
    tokens = bucket(x.shape[0])
    lying = [(t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    key = (spec, tokens, x.device, x.dtype, x.shape[1], *(t.dtype for t in rows), *lying)
    if key not in _MADE:
        _MADE[key] = _make(spec, layer(), tokens, x.device)
    return _MADE[key]


def _make(spec: str, layer: Layer, tokens: int, device: torch.device) -> _Made | None:
    import triton

    try:
        if device.type == "cuda":
            choice = choice_of(layer, tokens, _gpu(device), triton.__version__)
        else:
            choice = interpreted(layer, tokens)
        if layer.router and not layer.can_route:
            layer = replace(layer, router=None, router_params=())
        module = load(module_of(layer, choice))
    except Unsupported as e:
        _warn(spec, str(e))
        return None
    return _Made(module.layer, layer.router is not None, layer.added)


@cache
def _gpu(device: torch.device) -> Gpu:
    """The device's facts."""
    return of_device(device.index)


@cache
def _warn(spec: str, because: str) -> None:
    """Once for each layer."""
    warnings.warn(f"no kernels for {spec}: {because}; it runs by the reference", stacklevel=2)


def _signed(ids: Tensor) -> Tensor:
    """ids (T, K) as kernels read them: contiguous, in a dtype that has a −1."""
    return (ids if ids.dtype.is_signed else ids.int()).contiguous()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _define(name: str, schema: str, forward: Callable[..., Tensor], like: torch._ops.OpOverload) -> None:
    """An operator with the shapes of another."""
    torch.library.define(name, schema)
    torch.library.impl(name, "default")(forward)
    torch.library.register_fake(name)(lambda *inputs: like(*inputs))


_define(
    "dsmoe::generated_experts",
    "(Tensor x, Tensor ids, Tensor weights, Tensor[] params, str spec) -> Tensor",
    _experts,
    ops.EXPERTS,
)
_define(
    "dsmoe::generated_moe",
    "(Tensor x, Tensor[] router, Tensor[] params, Tensor[] shared, str spec) -> Tensor",
    _moe,
    ops.MOE,
)
EXPERTS: torch._ops.OpOverload = torch.ops.dsmoe.generated_experts.default
MOE: torch._ops.OpOverload = torch.ops.dsmoe.generated_moe.default
