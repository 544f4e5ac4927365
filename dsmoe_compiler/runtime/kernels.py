"""The generated kernels of a model, to be looked at: which are chosen for a layer and why, their text, and
what a compiler makes of it. Needs no GPU: tensors are of the meta device, and nothing runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import triton

from dsmoe_compiler.codegen import candidates, tuned
from dsmoe_compiler.codegen.architecture import ARCHITECTURES
from dsmoe_compiler.codegen.choice import Choice, choice_of
from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.codegen.gpu import Gpu, for_target, of_device
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.plan import bucket
from dsmoe_compiler.codegen.record import Launch, launches
from dsmoe_compiler.codegen.resources import Compiled, Resources, compile_launch, resources
from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped, Plan
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.nearest import unknown
from dsmoe_compiler.runtime.fused_layers import FusedLayer, fused_layers
from dsmoe_compiler.runtime.gpu_catalogue import named

__all__ = [
    "TRITON",
    "Choice",
    "Decode",
    "FusedLayer",
    "GemmTiles",
    "GemvTiles",
    "Gpu",
    "Grouped",
    "Kernel",
    "Plan",
    "Planned",
    "Resources",
    "Unsupported",
    "bucket",
    "compiled",
    "fused_layers",
    "gpu_for",
    "launched",
    "planned",
    "text_of",
]

TRITON: str = triton.__version__
# Where a plan comes from: measured by the user, measured and committed, the analytical model.
Origin: TypeAlias = Literal["yours", "table", "model"]


def gpu_for(target: str | None, name: str | None) -> Gpu:
    """The GPU to plan for: by its name in the catalogue ("H100"), by a compile target ("sm_80"), or else the
    one at hand, or else an H200. Raises InputError for names of none, and for two that do not agree.
    """
    if name is not None:
        gpu = named(name)
        if target not in (None, gpu.target):
            raise InputError(f"--gpu {name} is {gpu.target}, not {target}: leave one of the two out")
        return gpu
    if target is None:
        return of_device() if torch.cuda.is_available() else for_target("sm_90")
    if target not in ARCHITECTURES:
        raise InputError(unknown("architecture", target, ARCHITECTURES))
    return for_target(target)


@dataclass(frozen=True)
class Planned:
    """What runs a layer for so many tokens; times in microseconds, `predicted` by the analytical model,
    `measured` where the plan comes from a measurement.
    """

    tokens: int
    choice: Choice
    origin: Origin
    predicted: float
    measured: float | None


def planned(fused: FusedLayer, tokens: int, gpu: Gpu) -> Planned:
    """The plan for a layer and its bucket of tokens. Raises Unsupported where there are no kernels."""
    choice = choice_of(fused.layer, bucket(tokens), gpu, TRITON)
    problem = fused.layer.problem(choice.tokens)
    found = tuned.find(problem, gpu, TRITON)
    predicted = candidates.predicted(choice.plan, problem, gpu) * 1e6
    if found is None:
        return Planned(tokens, choice, "model", predicted, None)
    return Planned(tokens, choice, "yours" if found.own else "table", predicted, found.measured.microseconds)


def text_of(fused: FusedLayer, plan: Planned) -> str:
    """The module that runs a layer so, exactly as it is loaded. Raises Unsupported."""
    return module_of(fused.layer, plan.choice)


@dataclass(frozen=True)
class Kernel:
    """One launch of a layer, compiled."""

    launch: Launch
    compiled: Compiled

    @property
    def resources(self) -> Resources:
        """What a block of it takes of a GPU."""
        return resources(self.compiled)

    def text(self, stage: str) -> str:
        """Its text at a stage ("ttir", "ptx", "sass", …). Raises InputError where the target has none."""
        try:
            return self.compiled.text(stage)
        except ValueError as e:
            raise InputError(str(e)) from None


def launched(fused: FusedLayer, plan: Planned) -> list[Launch]:
    """The launches of a call with `plan.tokens` tokens, in order. Raises Unsupported, and InputError where
    the process was told to interpret kernels.
    """
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, and interpreted kernels are not compiled: unset it")
    module = load(text_of(fused, plan))
    host: Callable[..., object] = functools.partial(
        module.layer, **fused.arguments(fused.on_meta(plan.tokens))
    )
    return launches(module, host)


def compiled(
    launches: Sequence[Launch], target: str, progress: Callable[[str], None] = lambda stage: None
) -> Iterator[Kernel]:
    """The launches compiled for a target ("sm_90", "gfx942"); `progress` is told what is begun."""
    for launch in launches:
        progress(f"compile {launch.name} for {target}")
        yield Kernel(launch, compile_launch(launch.kernel, launch.arguments, launch.options, target))
