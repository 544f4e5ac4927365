"""Which of a layer's best candidate plans is the fastest when measured: what a tuned table would hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.errors import TritonError

from benchmarks.gpu_clock import Call, together
from benchmarks.gpu_inputs import Inputs, error, expected
from benchmarks.gpu_peers import experts_spec
from benchmarks.moe_shapes import Shape
from dsmoe_compiler.codegen import candidates, tuned
from dsmoe_compiler.codegen.choice import Choice
from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.plan import Problem, bucket, choose
from dsmoe_compiler.ir.spec import to_text
from dsmoe_compiler.runtime.layers import experts_layer


@dataclass(frozen=True)
class Tried:
    """A plan, its predicted and its measured microseconds; `failed` says why there are none measured."""

    plan: str
    predicted: float
    microseconds: float | None
    failed: str | None = None


@dataclass(frozen=True)
class Contest:
    """All that was tried for one layer and number of tokens, the chosen plan first; `gain`: how many times
    the best of them is faster than it, None where it did not run.
    """

    shape: str
    tokens: int
    problem: str
    tried: tuple[Tried, ...]
    gain: float | None


def contest(
    shape: Shape, sets: Sequence[Inputs], gpu: Gpu, count: int, seconds: float, tolerance: float
) -> tuple[Contest, tuple[Problem, tuned.Measured] | None]:
    """Time the chosen plan and the model's `count` best, each right first; and the winner, if any ran."""
    first = sets[0]
    tokens = bucket(len(first.x))
    params = [first.layer.gate_up, first.layer.down]
    layer = experts_layer(first.x, first.ids, first.weights, params, to_text(experts_spec(shape)))
    problem = layer.problem(tokens)
    chosen = choose(problem, gpu, triton.__version__)
    plans = list(dict.fromkeys([chosen, *(p for _, p in candidates.ranked(problem, gpu)[:count])]))
    wanted, calls, failed = expected(first), dict[str, Sequence[Call]](), dict[str, str]()
    for plan in plans:
        try:
            run = _run(layer, Choice(tokens, gpu, plan))
            off = error(run(first), wanted)
        except (RuntimeError, TritonError) as e:  # a plan that does not compile, or does not fit
            failed[str(plan)] = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            continue
        if off > tolerance:
            failed[str(plan)] = f"off by {off:.1e}"
            continue
        calls[str(plan)] = [_call(run, i) for i in sets]
    times = together(calls, seconds, first.x.device) if calls else {}
    tried = tuple(
        Tried(
            str(p),
            1e6 * candidates.predicted(p, problem, gpu),
            times[str(p)].microseconds if str(p) in times else None,
            failed.get(str(p)),
        )
        for p in plans
    )
    if not times:
        return Contest(shape.name, len(first.x), problem.text, tried, None), None
    best = min((p for p in plans if str(p) in times), key=lambda p: times[str(p)].microseconds)
    fastest = times[str(best)].microseconds
    gain = times[str(chosen)].microseconds / fastest if str(chosen) in times else None
    measured = tuned.Measured(best, fastest)
    return Contest(shape.name, len(first.x), problem.text, tried, gain), (problem, measured)


def _run(layer: Layer, choice: Choice) -> Callable[[Inputs], torch.Tensor]:
    module: Any = load(module_of(layer, choice))

    def run(i: Inputs) -> torch.Tensor:
        return module.layer(x=i.x, ids=i.ids, weights=i.weights, params=[i.layer.gate_up, i.layer.down])  # type: ignore[no-any-return]

    return run


def _call(run: Callable[[Inputs], torch.Tensor], i: Inputs) -> Call:
    return lambda: run(i)


def of_one_processor(gpu: Gpu) -> Gpu:
    """The same for the interpreter, which takes as long for a program whatever it does."""
    return replace(gpu, processors=1)
