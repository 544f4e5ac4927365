"""What the layers are run on: several sets of weights and routings that take turns, random, never zeros.

One set again and again would be read from L2, and its routing learned by nobody else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_floor import weight_bytes
from benchmarks.moe_shapes import Shape
from dsmoe_compiler.ir import reference

ROUTINGS = ("uniform", "skewed")
# Bytes of weights that one more copy may add up to: of large layers two copies take turns, of others four.
_COPIED = 24e9


@dataclass(frozen=True)
class Weights:
    """A layer's: gate_up (E, 2F, D) and down (E, D, F), which all ways to run the routed experts take; and,
    as the model's own layer has them, router, params and shared.
    """

    gate_up: Tensor
    down: Tensor
    router: list[Tensor]
    params: list[Tensor]
    shared: list[Tensor]


@dataclass(frozen=True)
class Inputs:
    """One call's: x (T, D), ids (T, K) int32 and weights (T, K) as a router gives them."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    layer: Weights

    @property
    def selected(self) -> int:
        """How many experts have a token."""
        return int(self.ids.unique().numel())  # type: ignore[no-untyped-call,unused-ignore]


def all_weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Weights]:
    """The copies that take turns."""
    copies = 4 if device.type == "cuda" and 4 * weight_bytes(shape) <= _COPIED else 2
    return [_weights(shape, dtype, device) for _ in range(copies)]


def _weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> Weights:
    def normal(*size: int) -> Tensor:
        # Drawn in their own dtype: float32 on the way would take twice the memory that the layer does.
        return torch.randn(size, dtype=dtype, device=device).mul_(size[-1] ** -0.5)

    e, d, f = shape.experts, shape.hidden, shape.width
    gate_up, down = normal(e, 2 * f, d), normal(e, d, f)
    # Only gpt-oss's own tensors lie in another way.
    params = [normal(*size) for size in shape.params] if shape.gpt_oss else [gate_up, down]
    router, shared = (
        [normal(*size) for size in sizes] for sizes in (shape.router_params, shape.shared_params)
    )
    return Weights(gate_up, down, router, params, shared)


def sets(shape: Shape, tokens: int, routing: str, copies: Sequence[Weights]) -> list[Inputs]:
    """So many that a graph of all is much longer than its launch, each with tokens and a routing of its own;
    every copy of the weights has its turns.
    """
    count = len(copies)
    if copies[0].down.is_cuda:
        count = max(count, 16 if tokens <= 64 else 8 if tokens <= 512 else 4)
    return [_inputs(shape, tokens, routing, copies[i % len(copies)]) for i in range(count)]


def _inputs(shape: Shape, tokens: int, routing: str, layer: Weights) -> Inputs:
    device, dtype = layer.down.device, layer.down.dtype
    # K experts without repetition, each with a chance of its own (Gumbel's trick).
    chances = torch.zeros(shape.experts, device=device)
    if (
        routing == "skewed"
    ):  # the second most popular expert has half of the first's tokens, the third a third
        order = torch.randperm(shape.experts, device=device)
        chances[order] = -torch.arange(1, shape.experts + 1, device=device, dtype=torch.float32).log()
    noise = -torch.empty(tokens, shape.experts, device=device).exponential_().log()
    best = (chances + noise).topk(shape.router.top_k).indices
    weights = torch.rand(tokens, shape.router.top_k, device=device).add_(0.1)
    weights = weights / weights.sum(-1, keepdim=True)
    x = torch.randn(tokens, shape.hidden, dtype=dtype, device=device)
    return Inputs(x, best.int(), weights.to(dtype), layer)


def expected(inputs: Inputs) -> Tensor:
    """The routed experts' output (T, D) in float32, from the same tensors, one expert after another."""
    x, layer = inputs.x.float(), inputs.layer
    out = torch.zeros_like(x)
    for e in inputs.ids.unique().tolist():  # type: ignore[no-untyped-call,unused-ignore]
        token, slot = torch.where(inputs.ids == e)
        gate, up = F.linear(x[token], layer.gate_up[e].float()).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, layer.down[e].float())
        out.index_add_(0, token, y * inputs.weights[token, slot, None].float())
    return out


def layer_agrees(outs: Sequence[Tensor], sets: Sequence[Inputs], shape: Shape, within: float) -> float:
    """The share of the tokens for which a whole layer's output is within that error of the reference's.

    Not all have to be: where two experts' logits are next to each other, or the same after rounding, either
    is right.
    """
    good = []
    for out, i in zip(outs, sets, strict=True):
        weights, ids = reference.route_tokens(i.x, i.layer.router, shape.spec)
        x, params = i.x.float(), [_Wide(p) for p in i.layer.params]
        wanted = reference.experts(x, ids, weights.float(), params, shape.spec.experts)  # type: ignore[arg-type]
        if shape.spec.shared:
            wanted += reference.shared_experts(x, [p.float() for p in i.layer.shared], shape.spec.shared)
        lengths = torch.linalg.vector_norm(wanted, dim=-1)
        good.append(torch.linalg.vector_norm(out.float() - wanted, dim=-1) <= within * lengths)
    return float(torch.cat(good).float().mean())


@dataclass(frozen=True)
class _Wide:
    """Experts' tensors of which one is made float32 at a time: all would take twice the layer's memory."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __getitem__(self, expert: int) -> Tensor:
        return self.tensor[expert].float()


def error(out: Tensor, wanted: Tensor) -> float:
    """‖out − wanted‖ / ‖wanted‖; infinite where something was not written or is no number."""
    found = float(torch.linalg.vector_norm(out.float() - wanted) / torch.linalg.vector_norm(wanted))
    return found if math.isfinite(found) else math.inf
