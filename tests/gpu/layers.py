"""Layers by name: bodies, routings and random tensors. T tokens, D model width, F expert width, E experts, K
experts per token.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, to_text
from tests.gpu.where import DEVICE

_GATE_AND_UP = "slice(h,0,F,1)", "slice(h,F,2F,1)"
_ALTERNATE = "slice(h,0,2F,2)", "slice(h,1,2F,2)"


def _gated(activation: str, halves: tuple[str, str]) -> str:
    return f"mul({activation}({halves[0]}),{halves[1]})"


# A body, and the shapes of its tensors behind E.
BODIES = {
    "SwiGLU stacked": (f"h=linear(x,p0); mul(linear({_gated('silu', _GATE_AND_UP)},p1),w)", "2F D, D F"),
    "SwiGLU interleaved": (f"h=linear(x,p0); mul(linear({_gated('silu', _ALTERNATE)},p1),w)", "2F D, D F"),
    "SwiGLU separate": ("mul(linear(mul(silu(linear(x,p0)),linear(x,p1)),p2),w)", "F D, F D, D F"),
    "SwiGLU transposed": (f"h=matmul(x,p0); mul(matmul({_gated('silu', _GATE_AND_UP)},p1),w)", "D 2F, F D"),
    "GeGLU": (f"h=linear(x,p0); mul(linear({_gated('gelu', _GATE_AND_UP)},p1),w)", "2F D, D F"),
    "ReLU FFN": ("mul(linear(relu(linear(x,p0)),p1),w)", "F D, D F"),
    "gpt-oss": (
        "h=add(matmul(x,p0),p1); g=clamp(slice(h,0,2F,2),None,7.0); "
        "mul(add(matmul(mul(add(clamp(slice(h,1,2F,2),-7.0,7.0),1),mul(g,sigmoid(mul(g,1.702)))),p2),p3),w)",
        "D 2F, 2F, F D, D",
    ),
    "weight inside": (f"h=linear(x,p0); linear(mul({_gated('silu', _GATE_AND_UP)},w),p1)", "2F D, D F"),
    "weight on x": (f"h=linear(mul(x,w),p0); linear({_gated('silu', _GATE_AND_UP)},p1)", "2F D, D F"),
}
ROUTINGS = ("uniform", "skewed", "one expert", "every other expert", "dropped", "all dropped")


@dataclass(frozen=True)
class Sizes:
    """Of a layer's experts."""

    hidden: int
    width: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Layer:
    """Routed experts with tensors, and tokens for them: the arguments of `dsmoe::experts`."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    params: list[Tensor]
    spec: ExpertsSpec

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], str]:
        """As the operator takes them."""
        return self.x, self.ids, self.weights, self.params, to_text(self.spec)


def spec_of(body: str, sizes: Sizes) -> ExpertsSpec:
    """The experts with this body."""
    text = _sized(BODIES[body][0], sizes)
    return ExpertsSpec(sizes.experts, sizes.hidden, parse_body(text))


def params_of(body: str, sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """Random tensors for it. A gate and an up product are of the size of 1, and sometimes meet a clamp at 7;
    what an expert adds is of the size of 1, too.
    """
    sized = shapes(body, sizes)
    last = max(i for i, shape in enumerate(sized) if len(shape) == 3)
    wide = 3 if "clamp" in BODIES[body][0] else 1
    made = []
    for i, shape in enumerate(sized):
        summed = sizes.width if i == last else sizes.hidden
        made.append(normal(*shape, dtype=dtype, std=0.5 if len(shape) == 2 else wide / math.sqrt(summed)))
    return made


def shapes(body: str, sizes: Sizes) -> list[list[int]]:
    """Of its tensors, E first."""
    return [[sizes.experts, *map(int, _sized(each, sizes).split())] for each in BODIES[body][1].split(",")]


def layer(body: str, sizes: Sizes, tokens: int, dtype: torch.dtype, routing: str = "uniform") -> Layer:
    """Routed experts and tokens for them."""
    ids = routed(routing, tokens, sizes)
    weights = torch.rand(ids.shape, device=DEVICE).to(dtype)
    x = normal(tokens, sizes.hidden, dtype=dtype)
    return Layer(x, ids, weights, params_of(body, sizes, dtype), spec_of(body, sizes))


def routed(routing: str, tokens: int, sizes: Sizes) -> Tensor:
    """ids (T, K), int64 as top-k gives them, those of a token distinct but for "one expert"."""
    experts, top_k = sizes.experts, sizes.top_k
    scores = torch.rand(tokens, experts, device=DEVICE)
    if routing == "one expert":
        return torch.full((tokens, top_k), experts - 1, device=DEVICE)
    if routing == "all dropped":
        return torch.full((tokens, top_k), -1, device=DEVICE)
    if routing == "skewed":  # the first experts have most of the tokens
        scores = scores.log() * torch.arange(1, experts + 1, device=DEVICE)
    if routing == "every other expert":
        scores[:, ::2] -= 1.0
    ids = scores.topk(top_k).indices
    if routing == "dropped":
        ids[torch.rand(ids.shape, device=DEVICE) < 0.3] = -1
        ids[:1] = -1  # a token that no expert gets
    return ids


def normal(*size: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    """Random numbers as wide as asked for, drawn in float32 so that every dtype gets the same."""
    return (torch.randn(size, device=DEVICE) * std).to(dtype)


def _sized(text: str, sizes: Sizes) -> str:
    text = re.sub(r"\b2F\b", str(2 * sizes.width), text)
    return re.sub(r"\bF\b", str(sizes.width), re.sub(r"\bD\b", str(sizes.hidden), text))
