"""Runs of a layer under a plan: whether it gives the reference's numbers, and how long it takes.

A plan decides about the experts' kernels; so a layer is given its routing here, random and uniform. Inputs
rotate, so that no weights are found in L2 that a model would not find there.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from triton.errors import TritonError

from dsmoe_compiler.codegen.choice import Choice
from dsmoe_compiler.codegen.gpu import Gpu, of_device
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.tiles import Problem
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.runtime.fused_layers import FusedLayer, Operands

# The median microseconds of one of these calls, all of which do the same on other inputs.
Timer: TypeAlias = Callable[[Sequence[Callable[[], object]]], float]

# Routings that a measurement goes through.
ROUTINGS = 4
_MOST_COPIES = 16
_WARM, _REPLAYS = 3, 20
# The largest difference from the reference, relative to a token's output: roundings of 2⁻⁸, 2⁻¹¹ and 2⁻²⁴ in
# both, at the hidden row, an expert's row, and the result.
ALLOWED = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-4}


@dataclass(frozen=True)
class Bench:
    """Where plans are measured: the device, its facts, and what times calls on it."""

    device: torch.device
    gpu: Gpu
    timer: Timer


@dataclass(frozen=True)
class Trial:
    """One plan: `microseconds` of the layer with it, `error` against the reference."""

    choice: Choice
    microseconds: float
    error: float


def bench_here() -> Bench:
    """The current CUDA or ROCm device. Raises InputError where there is none."""
    if not torch.cuda.is_available():
        raise InputError("--tune measures on a GPU, and torch sees none here")
    return Bench(torch.device("cuda", torch.cuda.current_device()), of_device(), graph_microseconds)


class _Wrong(Exception):
    """A plan whose result is not the reference's."""


class Trials:
    """Runs of one layer under several plans, on the same inputs."""

    def __init__(self, fused: FusedLayer, problem: Problem, bench: Bench) -> None:
        layer = replace(fused.layer, router=None, router_params=())
        self._fused, self._bench = replace(fused, layer=layer), bench
        self._calls = list(_inputs(self._fused, problem, bench))
        self._expected = _expected(self._fused, self._calls[0])
        self.measured = 0
        self.failed = list[tuple[Choice, str]]()

    def run(self, choice: Choice) -> Trial | None:
        """The layer so; None where it failed."""
        try:
            calls = self._run_by(self._fused, choice)
            error = _error(calls[0](), self._expected)
            if not error <= ALLOWED[self._fused.dtype]:
                raise _Wrong(f"differs from the reference by {error:.1e}")
            trial = Trial(choice, self._bench.timer(calls), error)
        except (TritonError, _Wrong) as e:
            self.failed.append((choice, f"{type(e).__name__.lstrip('_')}: {e}".splitlines()[0]))
            return None
        self.measured += 1
        return trial

    def without_shared(self, choice: Choice) -> float:
        """Microseconds of the layer so, its shared experts left out."""
        layer = replace(self._fused.layer, shared=None, shared_params=())
        return self._bench.timer(
            self._run_by(replace(self._fused, layer=layer), replace(choice, shared=None))
        )

    def _run_by(self, fused: FusedLayer, choice: Choice) -> list[Callable[[], Tensor]]:
        host = load(module_of(fused.layer, choice)).layer
        return [functools.partial(host, **fused.arguments(each)) for each in self._calls]

    def better(self, best: Trial | None, choice: Choice) -> Trial | None:
        """The faster of the best so far and another choice."""
        if best is not None and choice == best.choice:
            return best
        trial = self.run(choice)
        return min((t for t in (best, trial) if t), key=lambda t: t.microseconds, default=None)


def _inputs(fused: FusedLayer, problem: Problem, bench: Bench) -> Iterator[Operands]:
    """Random tensors of several calls: other tokens and routings in each, and other weights as long as all of
    them do not outgrow L2 fourfold.
    """
    generator = torch.Generator(bench.device).manual_seed(0)

    def random(like: Tensor) -> Tensor:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=bench.device)
        # A product's results are as large as its input's numbers, however long its sums.
        scale = like.shape[-1] ** -0.5 if like.dim() > 1 else 1.0
        return made.normal_(generator=generator).mul_(scale)

    own = fused.operands
    size = sum(t.numel() * t.element_size() for t in (*own.params, *own.shared))
    copies = max(1, min(_MOST_COPIES, math.ceil(4 * bench.gpu.l2 / size)))
    weights = [(tuple(map(random, own.params)), tuple(map(random, own.shared))) for _ in range(copies)]
    shape, layer = (problem.tokens, problem.experts), fused.layer
    for i in range(max(ROUTINGS, copies)):
        chosen = torch.rand(shape, generator=generator, device=bench.device).topk(problem.top_k)
        yield Operands(
            torch.randn(
                problem.tokens, own.x.shape[1], generator=generator, dtype=own.x.dtype, device=bench.device
            ),
            weights[i % copies][0],
            shared=weights[i % copies][1],
            ids=chosen.indices.to(torch.int32 if own.ids is None else own.ids.dtype),
            weights=chosen.values.softmax(-1).to(getattr(torch, layer.weights)),
        )


def _expected(fused: FusedLayer, given: Operands) -> Tensor:
    """The layer's output by the reference."""
    assert given.ids is not None and given.weights is not None
    out = reference.experts(given.x, given.ids, given.weights, given.params, fused.spec.experts)
    if fused.spec.shared is None:
        return out
    return out + reference.shared_experts(given.x, given.shared, fused.spec.shared)


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest difference of a token's output, relative to it; NaN where there is one."""
    difference = (got.double() - expected.double()).norm(dim=1)
    return float((difference / expected.double().norm(dim=1)).max())


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """All calls in one CUDA graph, replayed: the median replay, divided among them."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = [_replay(graph) for _ in range(_WARM + _REPLAYS)][_WARM:]
    return statistics.median(times) / len(calls)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3
