"""compile and inspect: the doors of the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from dsmoe_compiler import pipeline as passes
from dsmoe_compiler.capture import Captured, CaptureMode
from dsmoe_compiler.capture import capture as capture_model
from dsmoe_compiler.inputs import Inputs
from dsmoe_compiler.ir.errors import CaptureError, InputError, NotFused, Refusal
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import Pass
from dsmoe_compiler.pipeline import Progress, Verify
from dsmoe_compiler.program import Program
from dsmoe_compiler.replay import Replayed, replay
from dsmoe_compiler.report.report import PassReport, Report
from dsmoe_compiler.runtime.lower import BACKENDS, Backend, choose

Model = nn.Module | Callable[..., Any] | ExportedProgram


def compile(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    backend: Literal["auto", "cpu", "reference"] = "auto",
    capture: CaptureMode = "auto",
    pipeline: Sequence[Pass] | None = None,
    verify: Verify = "numeric",
    require_fused: bool = False,
    progress: Progress | None = None,
) -> Program:
    """Capture model(*args, **kwargs), fuse every Mixture-of-Experts layer that is understood, and lower the result.

    Args:
        model: a module, any function over tensors, or an ExportedProgram. It is left as it was.
        args, kwargs: an example call. Inputs that are no tensors become constants of the program.
        dynamic_shapes: "auto" (every size that can vary does, sizes 0 and 1 included) or torch.export's own form.
        backend: what runs the fused layers; "auto" is the CPU path for a model on the CPU.
        capture: "as_written" never switches a transformers model's experts implementation while tracing.
        pipeline: passes to run instead of the default ones.
        verify: "numeric" checks every rewrite and the whole program on numbers; "off" trusts them.
        require_fused: raise NotFused if any layer was refused.
        progress: called with the name of each stage when it begins.

    Raises:
        CaptureError: the model cannot be turned into a graph that computes the same.
        InputError: the arguments are not what is described here. NotFused: see `require_fused`.
    """
    _check_choices(backend=(backend, BACKENDS), capture=(capture, get_args(CaptureMode)), verify=(verify, get_args(Verify)))
    kwargs = dict(kwargs or {})
    captured, seconds = _captured(model, args, kwargs, dynamic_shapes, capture, progress)
    graph = ProgramGraph(captured.exported)
    if graph.on_meta():
        raise InputError("the model is on the meta device and has no weights: use inspect, or load its weights")
    chosen = choose(backend, captured.exported)
    nodes = len(graph.nodes)
    outcome = passes.run(graph, passes.DEFAULT if pipeline is None else tuple(pipeline), verify, progress)
    first = PassReport("capture", seconds, 0, nodes, True, None)
    report = Report(_name(model), captured.how, outcome.layers, (first, *outcome.passes), chosen, None, outcome.remarks)
    program = _lowered(captured, report, chosen, progress)
    if verify == "numeric" and not isinstance(model, ExportedProgram) and not _is_random(captured.exported):
        program = _checked(model, program, (tuple(args), kwargs), dynamic_shapes, capture, progress)
    if require_fused:
        _require_fused(program.report)
    return program


def inspect(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    capture: CaptureMode = "auto",
    progress: Progress | None = None,
) -> Report:
    """What compile would understand of the model: nothing is run, so it may live on the meta device.

    Arguments and errors as for `compile`.
    """
    _check_choices(capture=(capture, get_args(CaptureMode)))
    captured, seconds = _captured(model, args, dict(kwargs or {}), dynamic_shapes, capture, progress)
    graph = ProgramGraph(captured.exported)
    nodes = len(graph.nodes)
    outcome = passes.run(graph, passes.DEFAULT, "off", progress)
    first = PassReport("capture", seconds, 0, nodes, True, None)
    return Report(_name(model), captured.how, outcome.layers, (first, *outcome.passes), None, None, outcome.remarks)


def _captured(
    model: Model,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    mode: CaptureMode,
    progress: Progress | None,
) -> tuple[Captured, float]:
    if progress:
        progress("capture")
    start = time.perf_counter()
    captured = capture_model(model, args, kwargs, dynamic_shapes=dynamic_shapes, mode=mode)
    return captured, time.perf_counter() - start


def _lowered(captured: Captured, report: Report, backend: Backend, progress: Progress | None) -> Program:
    if progress:
        progress("lower")
    start = time.perf_counter()
    before = len(captured.exported.graph.nodes)
    program = Program(captured.exported, captured.call, report, backend)
    nodes = len(program.module.graph.nodes)
    lowering = PassReport("lower", time.perf_counter() - start, before, nodes, nodes != before, None)
    return program.with_report(replace(report, passes=(*report.passes, lowering)))


def _checked(
    model: Model,
    program: Program,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic_shapes: Any,
    mode: CaptureMode,
    progress: Progress | None,
) -> Program:
    """The program if it computes what the model does; else the captured graph alone, its layers refused."""
    if progress:
        progress("check")
    assert callable(model)
    start = time.perf_counter()
    replayed = replay(model, program, program.inputs, example)
    if not replayed.wrong:
        check = PassReport("check", time.perf_counter() - start, 0, 0, False, replayed.error)
        report = replace(program.report, program_error=replayed.error, passes=(*program.report.passes, check))
        return program.with_report(report)
    return _unfused(model, program, example, dynamic_shapes, mode, replayed)


def _unfused(
    model: Model,
    program: Program,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic_shapes: Any,
    mode: CaptureMode,
    replayed: Replayed,
) -> Program:
    """Whose fault is it? A plain capture that is wrong too is a CaptureError; else every layer is refused."""
    assert callable(model)
    plain = capture_model(model, *example, dynamic_shapes=dynamic_shapes, mode=mode)
    report = program.report
    refusal = Refusal("R501", f"with it the program gives other numbers than the model ({replayed.wrong})")
    layers = tuple(
        replace(x, fused=False, spec=None, refusal=replace(refusal, source=x.source)) if x.fused else x
        for x in report.layers
    )
    unfused = Program(plain.exported, plain.call, replace(report, layers=layers), program.backend)
    again = replay(model, unfused, unfused.inputs, example)
    if again.wrong:
        raise CaptureError(
            f"cannot capture {_name(model)}: the graph gives other numbers than the model on {again.wrong}; "
            "its code depends on values or sizes in a way that tracing does not see"
        )
    return unfused.with_report(replace(unfused.report, program_error=again.error))


def _require_fused(report: Report) -> None:
    refused = tuple((x.name, x.refusal) for x in report.layers if not x.fused and x.refusal is not None)
    if refused:
        raise NotFused(refused)


def _is_random(exported: ExportedProgram) -> bool:
    """Whether two runs differ by design (dropout in training mode, jitter), so that comparing them says nothing."""
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) and _draws(n) for n in exported.graph.nodes)


def _draws(node: Node) -> bool:
    """Whether a random operator draws numbers here: dropout by 0, or outside training, does not."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    if "dropout_p" in given or "attention" in node.target._schema.name:
        return given.get("dropout_p", 0.0) != 0.0
    return given.get("train", True) is not False and given.get("p", 1.0) != 0.0


def _check_choices(**choices: tuple[object, Sequence[object]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, (nn.Module, ExportedProgram)) else getattr(model, "__name__", "function")
