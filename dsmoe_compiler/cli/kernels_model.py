"""The fused layers of a MODEL argument, for `dsmoe kernels`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsmoe_compiler.cli.input_option import ExampleInput
from dsmoe_compiler.cli.model_argument import ModelCall, is_saved_program, resolve
from dsmoe_compiler.cli.stages import Stage, load_modules
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.report import Report

if TYPE_CHECKING:
    from dsmoe_compiler.ir.graph import ProgramGraph
    from dsmoe_compiler.runtime.kernels import FusedLayer

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class FusedModel:
    """MODEL, its report, its distinct fused layers, and what the user should be told of its origin."""

    text: str
    report: Report
    layers: tuple[FusedLayer, ...]
    notes: tuple[str, ...]

    def only(self, wanted: str) -> FusedModel:
        """With the one layer that `wanted` names or counts from 0, and those like it. Raises InputError."""
        from dsmoe_compiler.cli.one_layer import chosen_layer

        name = chosen_layer(self.report, wanted)
        found = tuple(layer for layer in self.layers if name in layer.names)
        if not found:
            why = f"`dsmoe explain {self.text} --layer {wanted}` says why"
            raise InputError(f"layer {wanted} is not fused and has no kernels: {why}")
        return replace(self, layers=found)


def load_kernels(stage: Stage) -> None:
    """Import what the command works with. Raises InputError where Triton is missing."""
    from dsmoe_compiler.runtime.triton_here import unavailable

    if why := unavailable(frozenset({"cuda"})):
        raise InputError(f"there are no kernels to show: {why}")
    load_modules(stage, "dsmoe_compiler.api", "dsmoe_compiler.runtime.kernels")


def fused_model(text: str, inputs: tuple[ExampleInput, ...], dtype: str | None, stage: Stage) -> FusedModel:
    """Capture MODEL and run the passes; zoo and hf: without weights, of a .pt2 file nothing is captured.

    Raises InputError where MODEL is not what the user believes, and what capture raises.
    """
    graph, report, notes = _after_passes(text, inputs, dtype, stage)
    from dsmoe_compiler.runtime.kernels import fused_layers

    if any(layer.fused and not layer.op for layer in report.layers):
        raise InputError(f"{text} was saved by an older version: compile it again")
    names = {layer.op: layer.name for layer in report.layers if layer.fused}
    return FusedModel(text, report, fused_layers(graph, names), notes)


def _after_passes(
    text: str, inputs: tuple[ExampleInput, ...], dtype: str | None, stage: Stage
) -> tuple[ProgramGraph, Report, tuple[str, ...]]:
    from dsmoe_compiler import api, program
    from dsmoe_compiler.ir.graph import ProgramGraph

    if is_saved_program(text):
        for option, given in (("--input", inputs), ("--dtype", dtype)):
            if given:
                raise click.UsageError(f"{option} has no meaning for a .pt2 file: it is not captured again.")
        stage(f"load {text}")
        saved = program.load(Path(text))
        return ProgramGraph(saved.exported), saved.report, ()
    stage(f"build {text}")
    call = resolve(text, inputs, with_weights=False)
    if dtype is not None:
        call = cast_call(text, call, dtype)
    done = api.optimize(call.model, call.args, call.kwargs, verify="off", progress=stage)
    return done.graph, done.report, call.notes


def cast_call(text: str, call: ModelCall, dtype: str) -> ModelCall:
    """The call with weights and numbers of that dtype. Raises InputError for a model that is no module."""
    import torch
    from torch import nn
    from torch.utils._pytree import tree_map_only

    if not isinstance(call.model, nn.Module):
        raise InputError(f"--dtype casts a module's weights, and {text} is a function: cast them in it")
    wanted = getattr(torch, dtype)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(wanted) if tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(torch.Tensor, cast, (call.args, call.kwargs))
    return replace(call, model=call.model.to(wanted), args=args, kwargs=kwargs)
