"""Ways to run one layer on a CPU: ours, transformers', what torch.compile makes of those, and onnxruntime's.

Every way has the same weights; those of torch have the very same memory.
T tokens, D model width, F expert hidden width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import dsmoe_compiler
from benchmarks import cpu_onnx
from benchmarks.cpu_shapes import Shape, as_transformers, expert_weights, route
from dsmoe_compiler.ir.spec import to_text
from dsmoe_compiler.runtime.cpu import CpuExperts

OURS, ROUTED = "ours", "ours, routed experts"
EAGER = "eager"
IMPLEMENTATIONS = (EAGER, "batched_mm", "grouped_mm")
COMPILED = " + torch.compile"
MOE, SPLIT = "onnxruntime MoE", "onnxruntime Split form"
NAMES = (OURS, ROUTED, *(how + by for how in IMPLEMENTATIONS for by in ("", COMPILED)), MOE, SPLIT)


@dataclass(frozen=True)
class Input:
    """Tokens (1, T, D), and what the router makes of them: ids and weights (T, K); `touched` experts."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    touched: int


Run = Callable[[Input], Tensor]


@dataclass(frozen=True)
class Way:
    """`runs`: one a layer, taking turns. `gathers`: a copy of its expert's weights for every pair;
    `own_threads`: others than torch's, which go on spinning for a while after their work.
    """

    name: str
    runs: Sequence[Run]
    gathers: bool = False
    own_threads: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.name in (OURS, ROUTED)


def inputs(layer: nn.Module, tokens: int, count: int) -> list[Input]:
    """Random tokens and their routing."""
    weight = next(layer.parameters())
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        x_BTD = torch.randn(1, tokens, _width(layer), generator=generator).to(weight.dtype)
        ids_TK, weights_TK = route(layer, x_BTD[0])
        found.append(Input(x_BTD, ids_TK, weights_TK, int(ids_TK.flatten().bincount().count_nonzero())))
    return found


def ours(layers: Sequence[nn.Module], shape: Shape) -> list[Way]:
    """The compiled layer as its user calls it, and its routed experts alone, on given ids."""
    example = (torch.randn(3, 11, shape.width).to(next(layers[0].parameters()).dtype),)
    first = dsmoe_compiler.compile(layers[0], example, require_fused=True)
    # The others are the same layer elsewhere in memory: what was checked once need not be again.
    others = [dsmoe_compiler.compile(x, example, require_fused=True, verify="off") for x in layers[1:]]
    spec = first.report.layers[0].spec
    assert spec is not None, "require_fused leaves no layer without"
    experts = CpuExperts(to_text(spec.experts))

    def routed(layer: nn.Module) -> Run:
        params = list(expert_weights(layer))
        return lambda i: cast(Tensor, experts(i.x[0], i.ids, i.weights, params))

    return [
        Way(OURS, [_whole(p) for p in [first, *others]]),
        Way(ROUTED, [routed(layer) for layer in layers]),
    ]


def transformers_ways(layers: Sequence[nn.Module], shape: Shape) -> list[Way]:
    """Its three ways to run experts, plain, and compiled for any T: torch.compile makes one graph for T = 1
    and one for all others.
    """
    found = []
    for how in IMPLEMENTATIONS:
        twins = [as_transformers(layer, shape, how) for layer in layers]
        compiled = [cast(nn.Module, torch.compile(twin, dynamic=True)) for twin in twins]
        gathers = how == "batched_mm"
        found.append(Way(how, [_whole(t) for t in twins], gathers))
        found.append(Way(f"{how}{COMPILED}", [_whole(c) for c in compiled], gathers))
    return found


def onnxruntime_ways(layers: Sequence[nn.Module], shape: Shape, dtype: torch.dtype) -> list[Way] | str:
    """Its own operator and the standard form, or why there are none.

    A session copies its weights, so there are fewer layers where one of them is larger than any cache.
    """
    if not cpu_onnx.INSTALLED:
        return "not installed: pip install onnxruntime onnx"
    if dtype != torch.float32:
        return f"none: no kernel for {str(dtype).removeprefix('torch.')} on a CPU"
    some = layers[: shape.copies(dtype, least=1)]
    threads = torch.get_num_threads()
    builds = {MOE: cpu_onnx.contrib_moe, SPLIT: cpu_onnx.split_form}
    return [
        Way(name, [_whole(build(layer, shape, threads)) for layer in some], own_threads=True)
        for name, build in builds.items()
    ]


def _whole(layer: Callable[[Tensor], Tensor]) -> Run:
    return lambda i: layer(i.x)


def _width(layer: nn.Module) -> int:
    return expert_weights(layer)[1].shape[1]
