"""The operators every pass produces and every backend lowers.

    dsmoe::route  (Tensor logits, Tensor? selection_bias, str spec) -> (Tensor weights, Tensor ids)
    dsmoe::experts(Tensor x, Tensor ids, Tensor weights, Tensor[] params, str spec) -> Tensor
    dsmoe::moe    (Tensor x, Tensor[] router, Tensor[] params, Tensor[] shared, str spec) -> Tensor
    dsmoe::pack   (Tensor[] parts) -> Tensor

x (T, D), logits (T, E), ids (T, K) integers with −1 for a dropped slot, weights (T, K); `params` are the
experts' tensors, E first, in the model's own layout. `router` is the logits' weight (E, D), then its bias
where the spec has one, then the selection bias where the spec has one. `spec` is the canonical line of an
ExpertsSpec, RouterSpec or MoESpec. `pack` is the experts' own tensors as
one with the experts first. Called directly, the operators run the reference; gradients flow through the
same maths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, parse, to_text


def _route(logits: Tensor, selection_bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    return reference.route(logits, selection_bias, parse(spec, RouterSpec))


def _experts(x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: str) -> Tensor:
    return reference.experts(x, ids, weights, params, parse(spec, ExpertsSpec))


def _moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: str
) -> Tensor:
    return reference.moe(x, router, params, shared, parse(spec, MoESpec))


def _fake_experts(x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor], spec: str) -> Tensor:
    layer = parse(spec, ExpertsSpec)
    width, dtype = reference.row_shape(layer, x, weights, params)
    return x.new_empty(x.shape[0], width, dtype=reference.out_dtype(layer, dtype))


def _fake_moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor], spec: str
) -> Tensor:
    layer = parse(spec, MoESpec)
    weights, ids = reference.route_tokens(x, router, layer)
    out = _fake_experts(x, ids, weights, params, to_text(layer.experts))
    return out + reference.shared_experts(x, shared, layer.shared) if layer.shared else out


def _pack(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts))


def _differentiable(name: str, forward: Callable[..., Any]) -> None:
    """Gradients by running the reference once more with autograd on, in backward."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        flat = [t for group in inputs for t in (group if isinstance(group, (list, tuple)) else [group])]
        ctx.layout = [len(group) if isinstance(group, (list, tuple)) else None for group in inputs]
        ctx.constants = [None if isinstance(t, Tensor) else t for t in flat]
        ctx.save_for_backward(*[t for t in flat if isinstance(t, Tensor)])

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        flat = [next(saved) if c is None else c for c in ctx.constants]
        leaves = [
            t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in flat
        ]
        with torch.enable_grad():
            out = forward(*_regroup(leaves, ctx.layout))
        outputs = out if isinstance(out, tuple) else (out,)
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        flowing = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in flowing], wanted, [g for _, g in flowing], allow_unused=True)
        )
        return tuple(
            _regroup([next(found) if any(t is w for w in wanted) else None for t in leaves], ctx.layout)
        )

    torch.library.register_autograd(name, backward, setup_context=setup)


def _regroup(flat: list[Any], layout: list[int | None]) -> list[Any]:
    items = iter(flat)
    return [next(items) if size is None else [next(items) for _ in range(size)] for size in layout]


def _define(name: str, schema: str, forward: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.define(name, schema)
    torch.library.impl(name, "default")(forward)
    torch.library.register_fake(name)(fake)
    _differentiable(name, forward)


_define(
    "dsmoe::route", "(Tensor logits, Tensor? selection_bias, str spec) -> (Tensor, Tensor)", _route, _route
)
_define(
    "dsmoe::experts",
    "(Tensor x, Tensor ids, Tensor weights, Tensor[] params, str spec) -> Tensor",
    _experts,
    _fake_experts,
)
_define(
    "dsmoe::moe",
    "(Tensor x, Tensor[] router, Tensor[] params, Tensor[] shared, str spec) -> Tensor",
    _moe,
    _fake_moe,
)
_define("dsmoe::pack", "(Tensor[] parts) -> Tensor", _pack, _pack)

MOE: torch._ops.OpOverload = torch.ops.dsmoe.moe.default
EXPERTS: torch._ops.OpOverload = torch.ops.dsmoe.experts.default
ROUTE: torch._ops.OpOverload = torch.ops.dsmoe.route.default
PACK: torch._ops.OpOverload = torch.ops.dsmoe.pack.default
