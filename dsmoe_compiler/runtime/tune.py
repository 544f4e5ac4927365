"""Choosing plans by measuring them: the few that the analytical model ranks best for one layer and one number
of tokens. The winner goes into the user's cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch

from dsmoe_compiler.codegen import candidates, tuned
from dsmoe_compiler.codegen.choice import Choice, choice_of
from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.plan import bucket, choose_shared
from dsmoe_compiler.codegen.tiles import Decode, Grouped, Plan, Problem
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.runtime.fused_layers import FusedLayer
from dsmoe_compiler.runtime.kernels import TRITON
from dsmoe_compiler.runtime.trials import Bench, Trial, Trials

# How many plans are measured, by the model's ranking.
MOST = 12
# At least so many of decode and of grouped plans each.
_OF_EACH = 4


@dataclass(frozen=True)
class Tuned:
    """What came of a layer and a bucket of tokens: the plan it had (None where that failed), the best one,
    how many were measured, and those that did not compile or were wrong, with the reason.
    """

    fused: FusedLayer
    tokens: int
    old: Trial | None
    new: Trial
    measured: int
    failed: tuple[tuple[Choice, str], ...]


def tune(fused: FusedLayer, tokens: int, bench: Bench, most: int = MOST) -> Tuned:
    """Measure the plans that rank best for a layer and the bucket of so many tokens, and keep the winner in
    the user's cache, where plans are looked up first.

    The plan of shared experts that run beside is chosen after that of the others. Raises Unsupported where
    there are no kernels, and InputError where the GPU's memory does not hold the layer.
    """
    problem = fused.layer.problem(bucket(tokens))
    try:
        return _tuned(fused, problem, bench, most)
    except torch.cuda.OutOfMemoryError:
        what = f"{fused.names[0] or 'the layer'} with {problem.tokens} tokens"
        raise InputError(f"{bench.gpu.name} has no memory for {what}: ask for fewer with -T") from None


def _tuned(fused: FusedLayer, problem: Problem, bench: Bench, most: int) -> Tuned:
    trials = Trials(fused, problem, bench)
    first = choice_of(fused.layer, problem.tokens, bench.gpu, TRITON)
    old = best = trials.run(first)
    for plan in _candidates(problem, bench.gpu, most):
        best = trials.better(best, replace(first, plan=plan, shared=_shared(plan, problem, bench.gpu)))
    if best is None:
        raise RuntimeError(f"no plan for {problem.text} works: {trials.failed[0][1]}")
    found = {problem: tuned.Measured(best.choice.plan, best.microseconds)}
    if best.choice.shared is not None and problem.shared is not None:
        for plan in _candidates(problem.shared, bench.gpu, most):
            if isinstance(plan, Grouped):
                best = trials.better(best, replace(best.choice, shared=plan)) or best
        assert best.choice.shared is not None
        # What two launches add; noise alone could make that nothing.
        beside = max(0.1, best.microseconds - trials.without_shared(best.choice))
        found = {
            problem: tuned.Measured(best.choice.plan, best.microseconds),
            problem.shared: tuned.Measured(best.choice.shared, beside),
        }
    tuned.store(found, bench.gpu, TRITON)
    return Tuned(fused, problem.tokens, old, best, trials.measured, tuple(trials.failed))


def _candidates(problem: Problem, gpu: Gpu, most: int) -> list[Plan]:
    """The best by the model, and the best of each kind."""
    ranked = [plan for _, plan in candidates.ranked(problem, gpu)]
    kinds = ([p for p in ranked if isinstance(p, kind)][:_OF_EACH] for kind in (Decode, Grouped))
    return list(dict.fromkeys([*ranked[:most], *chain(*kinds)]))


def _shared(plan: Plan, problem: Problem, gpu: Gpu) -> Grouped | None:
    """The plan of the shared experts beside a plan, where they are not in its own kernels."""
    return choose_shared(problem, gpu, TRITON) if isinstance(plan, Grouped) and problem.shared else None
