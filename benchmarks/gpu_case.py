"""One layer at one number of tokens: every way checked, then timed together with the others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from benchmarks.gpu_clock import Call, Times, together
from benchmarks.gpu_floor import Ceilings
from benchmarks.gpu_foreign import ForeignExperts, tiles_for, with_descriptors
from benchmarks.gpu_inputs import Inputs, error, expected, layer_agrees
from benchmarks.gpu_kernels import kernel_times
from benchmarks.gpu_peers import LAYER, OURS, Peer, experts_spec, ours_layer, peers
from benchmarks.moe_shapes import Shape
from dsmoe_compiler.codegen import candidates
from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.plan import bucket, choose
from dsmoe_compiler.ir.spec import to_text
from dsmoe_compiler.runtime.layers import experts_layer

# Three roundings to bfloat16, 2⁻⁸ each, for ours; one or two more for others, which round between SiLU and
# product, and before the sum over slots.
TOLERANCE = 5 * 2.0**-8
# Of a whole layer's tokens; see `layer_agrees`.
AGREEING = 0.8


@dataclass(frozen=True)
class Figure:
    """One way's time; `over_floor`: that many times the floor; `error` against float32."""

    times: Times
    over_floor: float
    error: float


@dataclass(frozen=True)
class Case:
    """All ways to run one layer. Times in microseconds; `selected`: experts with tokens, on average;
    `left_out`: why some were not measured; `kernels` and `layer_kernels`: where our time goes; `plan`: ours,
    and `predicted` its time by the analytical model.
    """

    shape: str
    tokens: int
    routing: str
    selected: float
    floor: float
    layer_floor: float
    figures: Mapping[str, Figure]
    left_out: Mapping[str, str]
    kernels: Mapping[str, float]
    layer_kernels: Mapping[str, float]
    plan: str
    predicted: float


@dataclass(frozen=True)
class Bench:
    """What all cases share: the device and its ceilings, other people's kernels, seconds to time each."""

    device: torch.device
    gpu: Gpu
    ceilings: Ceilings
    foreign: Mapping[str, Any]
    seconds: float


def measure(shape: Shape, sets: Sequence[Inputs], routing: str, bench: Bench, compiles: bool) -> Case:
    """Check and time; with `compiles`, also what has to be compiled by torch first.

    Raises RuntimeError where our own answer is wrong.
    """
    tokens = len(sets[0].x)
    copies = list({id(i.layer): i.layer for i in sets}.values())
    ways = [p for p in peers(shape, tokens, copies) if compiles or not p.compiles]
    ways += _foreign(shape, tokens, sets, bench)
    wanted, calls, errors, left_out = expected(sets[0]), dict[str, list[Call]](), dict[str, float](), {}
    for way in ways:
        try:
            off = error(_checked(way, sets[0]), wanted)
        except (RuntimeError, ValueError, TritonError) as e:
            if way.name == OURS:
                raise
            left_out[way.name] = _first_line(e)
            continue
        if off > TOLERANCE and way.name == OURS:
            raise RuntimeError(f"{shape.name}, T={tokens}, {routing}: ours is off by {off:.1e}")
        if off > TOLERANCE:
            left_out[way.name] = f"off by {off:.1e}"
            continue
        calls[way.name], errors[way.name] = [_call(way, i) for i in sets], off
    layer = ours_layer(shape)
    if routing == "uniform":  # a layer's own routing is what its router makes of random tokens
        errors[LAYER] = _check_layer(layer, sets, shape)
        calls[LAYER] = [_call(layer, i) for i in sets]
    waiting = {way.name for way in ways if way.waits}
    times = together(calls, bench.seconds, bench.device, waiting)
    selected = sum(i.selected for i in sets) / len(sets)
    floor = 1e6 * bench.ceilings.experts(shape, tokens, selected)
    layer_floor = 1e6 * bench.ceilings.layer(shape, tokens, selected)
    figures = {
        name: Figure(t, t.microseconds / (layer_floor if name == LAYER else floor), errors[name])
        for name, t in times.items()
    }
    plan, predicted = _planned(shape, sets[0], bench.gpu)
    return Case(
        shape.name,
        tokens,
        routing,
        selected,
        floor,
        layer_floor,
        figures,
        left_out,
        kernel_times(calls[OURS], bench.device),
        kernel_times(calls[LAYER], bench.device) if LAYER in calls else {},
        plan,
        predicted,
    )


def _foreign(shape: Shape, tokens: int, sets: Sequence[Inputs], bench: Bench) -> Iterator[Peer]:
    for name, kernel in bench.foreign.items():
        for tiles in with_descriptors(kernel, tiles_for(tokens * shape.router.top_k, shape.experts)):
            run = ForeignExperts(kernel, tiles)
            run.prepare(sets)
            yield Peer(f"{name} {tiles}", run)


def _checked(way: Peer, i: Inputs) -> Tensor:
    with _poisoned() if way.name == OURS else torch.no_grad():
        return way.run(i)


def _check_layer(layer: Peer, sets: Sequence[Inputs], shape: Shape) -> float:
    """The share of tokens on which the whole layer does not agree. Raises RuntimeError if it is large."""
    with _poisoned():
        outs = [layer.run(i) for i in sets]
    agree = layer_agrees(outs, sets, shape, TOLERANCE)
    if agree < AGREEING:
        raise RuntimeError(f"{shape.name}: the whole layer is wrong for {1 - agree:.0%} of the tokens")
    return 1 - agree


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory holds NaN: what is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", "no kernels for")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _planned(shape: Shape, i: Inputs, gpu: Gpu) -> tuple[str, float]:
    """Our plan, and its time by the model."""
    layer = experts_layer(
        i.x, i.ids, i.weights, [i.layer.gate_up, i.layer.down], to_text(experts_spec(shape))
    )
    problem = layer.problem(bucket(len(i.x)))
    plan = choose(problem, gpu, triton.__version__)
    return str(plan), 1e6 * candidates.predicted(plan, problem, gpu)


def _call(way: Peer, i: Inputs) -> Call:
    return lambda: way.run(i)


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:200]}"


def of_group(case: Case, prefix: str) -> tuple[str, float]:
    """The fastest of the ways whose names begin so, and its time; infinite where there is none."""
    found = [(f.times.microseconds, name) for name, f in case.figures.items() if name.startswith(prefix)]
    return (min(found)[1], min(found)[0]) if found else ("", math.inf)
