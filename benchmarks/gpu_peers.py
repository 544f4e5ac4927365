"""Ways to run the same routed experts on a GPU: ours, torch's and transformers', and what torch.compile makes
of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_floor import expert_bytes
from benchmarks.gpu_inputs import Inputs, Weights
from benchmarks.moe_shapes import Shape
from benchmarks.peers import IMPLEMENTATIONS, TransformersExperts
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, to_text
from dsmoe_compiler.models.experts import RoutedExperts
from dsmoe_compiler.runtime.generated import EXPERTS, MOE

OURS, LAYER = "ours", "ours, whole layer"
GROUPED = "torch grouped_mm"
Run = Callable[[Inputs], Tensor]
# Bytes of the copies of weights that a way which gathers them for every pair may make.
_GATHERED = 8e9
# Tokens up to which the batched product is worth compiling.
_BATCHED = 8
# Tokens up to which a loop over experts, which waits for the GPU at each, is worth a look.
_LOOPED = 64


@dataclass(frozen=True)
class Peer:
    """One way: `run` gives the output (T, D). `compiles`: it takes torch.compile's time first; `waits`: for
    the GPU, so that no graph can hold it.
    """

    name: str
    run: Run
    compiles: bool = False
    waits: bool = False


def experts_spec(shape: Shape) -> ExpertsSpec:
    """SwiGLU, gate and up stacked, the routing weight on the output."""
    f = shape.width
    body = f"h=linear(x,p0); mul(linear(mul(silu(slice(h,0,{f},1)),slice(h,{f},{2 * f},1)),p1),w)"
    return ExpertsSpec(shape.experts, shape.hidden, parse_body(body))


def ours(shape: Shape) -> Peer:
    """The generated kernels of the routed experts."""
    spec = to_text(experts_spec(shape))
    return Peer(OURS, lambda i: EXPERTS(i.x, i.ids, i.weights, [i.layer.gate_up, i.layer.down], spec))


def ours_layer(shape: Shape) -> Peer:
    """The generated kernels of the model's own layer, which routes by itself."""
    spec = shape.spec.text

    def run(i: Inputs) -> Tensor:
        return MOE(i.x, i.layer.router, i.layer.params, i.layer.shared, spec)  # type: ignore[no-any-return]

    return Peer(LAYER, run)


def grouped_mm(inputs: Inputs) -> Tensor:
    """Sort, gather, product, activation, product, scatter, sum: composed by hand, nothing waits."""
    ids, layer = inputs.ids.flatten(), inputs.layer
    tokens, top_k = inputs.ids.shape
    experts = layer.down.shape[0]
    by_expert, order = ids.sort(stable=True)
    ends = torch.searchsorted(
        by_expert, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True
    )
    offsets = ends.int()
    rows = inputs.x[order // top_k]
    gate, up = F.grouped_mm(rows, layer.gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, layer.down.transpose(1, 2), offs=offsets)
    weighted = y * inputs.weights.flatten()[order, None]
    out = torch.empty_like(weighted)
    out[order] = weighted
    return out.view(tokens, top_k, -1).sum(1)


Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def transformers(implementation: str, copies: Sequence[Weights], wrap: Wrap = lambda run: run) -> Run:
    """One of transformers' implementations on the same tensors, its call wrapped."""
    modules = {id(w): TransformersExperts(_as_experts(w), implementation).eval() for w in copies}
    # The module is an argument, so that one compilation serves all copies.
    call = wrap(lambda module, x, ids, weights: module(x, ids, weights))

    def run(i: Inputs) -> Tensor:
        return call(modules[id(i.layer)], i.x, i.ids.long(), i.weights)

    return run


def _as_experts(weights: Weights) -> RoutedExperts:
    made = SimpleNamespace(
        gate_up_proj=nn.Parameter(weights.gate_up, requires_grad=False),
        down_proj=nn.Parameter(weights.down, requires_grad=False),
    )
    return cast(RoutedExperts, made)


def peers(shape: Shape, tokens: int, copies: Sequence[Weights]) -> Iterator[Peer]:
    """All ways that are worth their time for so many tokens, ours first, those that compile last."""
    yield ours(shape)
    yield Peer(GROUPED, grouped_mm)
    if IMPLEMENTATIONS:
        yield Peer("transformers grouped_mm", transformers("grouped_mm", copies))
        if tokens * shape.router.top_k * expert_bytes(shape) <= _GATHERED:
            yield Peer("transformers batched_mm", transformers("batched_mm", copies))
    if IMPLEMENTATIONS and tokens <= _LOOPED:
        yield Peer("transformers eager", transformers("eager", copies), waits=True)
    torch.compiler.reset()  # else at the ninth size it would run uncompiled, and not say so
    for peer in _compiled(shape, tokens, copies):
        yield Peer(f"torch.compile of {peer.name}", peer.run, compiles=True)


def _compiled(shape: Shape, tokens: int, copies: Sequence[Weights]) -> Iterator[Peer]:
    """The grouped product, and of so few tokens that it may win, the batched one: each takes seconds."""
    options = _COMPILE[copies[0].down.device.type]

    def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(run, **options)  # type: ignore[no-any-return,unused-ignore]

    yield Peer(GROUPED, compiled(grouped_mm))
    if IMPLEMENTATIONS and tokens <= _BATCHED:
        yield Peer("transformers batched_mm", transformers("batched_mm", copies, compiled))


_COMPILE: dict[str, dict[str, Any]] = {
    "cuda": {"backend": "inductor", "dynamic": False},
    "cpu": {"backend": "aot_eager", "dynamic": False},
}
