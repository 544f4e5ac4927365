"""compile and inspect: the doors of the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.export import ExportedProgram

from dsmoe_compiler import pipeline as passes
from dsmoe_compiler.capture import Captured, CaptureMode
from dsmoe_compiler.capture import capture as capture_model
from dsmoe_compiler.cost_model.cost import USUAL_GPU, Cost, cost_of
from dsmoe_compiler.functions import as_module
from dsmoe_compiler.instrument import Instrument
from dsmoe_compiler.interrupt import Deferred, forwards, poll
from dsmoe_compiler.ir.errors import CaptureError, InputError, NotFused, Refusal
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.leftovers import drop_leftovers, has_sizes_of_data
from dsmoe_compiler.ir.passes import Pass
from dsmoe_compiler.ir.randomness import is_random
from dsmoe_compiler.ir.rounding import round_by_division
from dsmoe_compiler.pipeline import Progress, Verify
from dsmoe_compiler.program import Program, name_outputs
from dsmoe_compiler.replay import replay, replay_routings
from dsmoe_compiler.report.report import PassReport, Report
from dsmoe_compiler.runtime.lower import BACKENDS, Backend, choose
from dsmoe_compiler.runtime.native.library import describe
from dsmoe_compiler.runtime.native.reasons import not_native
from dsmoe_compiler.tracing.assumption import Assumption
from dsmoe_compiler.turns import TURN
from dsmoe_compiler.validate import validate

Model = nn.Module | Callable[..., Any] | ExportedProgram
_ASSUMED = {False: "assumed, not checked", True: "assumed, and held on forced routings"}


def compile(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    backend: Literal["auto", "cpu", "triton", "reference"] = "auto",
    capture: CaptureMode = "auto",
    pipeline: Sequence[Pass] | str | None = None,
    verify: Verify = "numeric",
    require_fused: bool = False,
    progress: Progress | None = None,
) -> Program:
    """Capture model(*args, **kwargs), fuse every Mixture-of-Experts layer that is understood, and lower the
    result. One thread does so at a time, others wait for their turn.

    Args:
        model: a module, any function over tensors, or an ExportedProgram. It is left as it was.
        args, kwargs: an example call. Inputs that are no tensors become constants of the program.
        dynamic_shapes: "auto" (every size that can vary does, 0 and 1 included) or torch.export's own form.
        backend: what runs the fused layers; "auto" is the CPU path for a model on the CPU, "triton" on a GPU.
        capture: "as_written" never switches a transformers model's experts implementation while tracing.
        pipeline: passes to run instead of the default ones, or their text: "normalize,lift_experts".
        verify: "numeric" checks every rewrite and the whole program on numbers; "off" trusts them.
        require_fused: raise NotFused if any layer was refused.
        progress: called with the name of each stage when it begins.

    Raises:
        CaptureError: the model cannot be turned into a graph that computes the same.
        InputError: the arguments are not what is described here. NotFused: see `require_fused`.
    """
    check_choices(
        backend=(backend, BACKENDS),
        capture=(capture, get_args(CaptureMode)),
        verify=(verify, get_args(Verify)),
    )
    steps = passes.steps_of(pipeline)
    request = _request(model, args, kwargs, dynamic_shapes, capture)
    with TURN, Deferred(request.interruptible()):
        if request.on_meta():
            raise InputError(
                "the model is on the meta device and has no weights: use inspect, or load its weights"
            )
        program = _compiled(request, backend, steps, verify, _polling(progress))
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
    instruments: Sequence[Instrument] = (),
) -> Report:
    """What compile would understand of the model: nothing is run, so it may live on the meta device.

    Arguments and errors as for `compile`; `instruments` watch the passes.
    """
    report = optimize(
        model,
        args,
        kwargs,
        dynamic_shapes=dynamic_shapes,
        capture=capture,
        verify="off",
        progress=progress,
        instruments=instruments,
    ).report
    return replace(report, kernels=describe())


def cost(
    model: Model | Program,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    seq: int | None = None,
    gpu: str = USUAL_GPU,
    dynamic_shapes: Any = "auto",
    capture: CaptureMode = "auto",
    progress: Progress | None = None,
) -> Cost:
    """What a forward of `batch` sequences of `seq` tokens takes: parameters, FLOPs, bytes of weights, and the
    least time on a GPU of the catalogue. Nothing is run, so the model may live on the meta device.

    `seq` None is 4096, or the most the model takes. Other arguments and errors as for `compile`; of a
    compiled program its own graph is counted, and arguments are not needed. Raises InputError also where the
    model takes no such sizes.
    """
    if isinstance(model, Program):
        return cost_of(ProgramGraph(model.exported), model.report, batch=batch, seq=seq, gpu=gpu)
    done = optimize(
        model,
        args,
        kwargs,
        dynamic_shapes=dynamic_shapes,
        capture=capture,
        verify="off",
        progress=progress,
    )
    if progress:
        progress("count")
    return cost_of(done.graph, done.report, batch=batch, seq=seq, gpu=gpu)


@dataclass(frozen=True)
class Optimized:
    """A captured graph after a pipeline, the story of how it became that, what tracing assumed, and whether
    that was put to the test.
    """

    graph: ProgramGraph
    report: Report
    assumed: tuple[Assumption, ...]
    held: bool

    @property
    def how_assumed(self) -> str:
        """Whether what was assumed is known to hold, in words."""
        return _ASSUMED[self.held]


def optimize(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    capture: CaptureMode = "auto",
    pipeline: Sequence[Pass] | str | None = None,
    verify: Verify = "numeric",
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
) -> Optimized:
    """Capture and passes alone: what compile would lower. Nothing is verified on the meta device.

    Arguments and errors as for `compile`; `instruments` watch the passes.
    """
    check_choices(capture=(capture, get_args(CaptureMode)), verify=(verify, get_args(Verify)))
    steps = passes.steps_of(pipeline)
    request, stage = _request(model, args, kwargs, dynamic_shapes, capture), _polling(progress)
    with TURN, Deferred(request.interruptible()):
        captured, first = _captured(request, False, stage)
        held = verify == "numeric" and not request.on_meta() and _held(request, captured, stage)
        graph = ProgramGraph(captured.exported)
        outcome = passes.run(graph, steps, verify, stage, instruments)
    passed = (first, *outcome.passes)
    remarks = (*_told(captured, held), *outcome.remarks)
    report = Report(_name(model), captured.how, outcome.layers, passed, None, None, remarks)
    return Optimized(graph, report, captured.assumed, held)


@dataclass(frozen=True)
class _Request:
    """What the user asked to have captured."""

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    mode: CaptureMode

    def captured(self, exact: bool) -> Captured:
        """A graph of it; see `capture.capture`."""
        return capture_model(
            self.model,
            self.args,
            self.kwargs,
            dynamic_shapes=self.dynamic_shapes,
            mode=self.mode,
            exact=exact,
        )

    def interruptible(self) -> frozenset[CodeType]:
        """Code that may as well raise when it is called: the model's own, and the check of one rewrite."""
        own = {validate.__code__}
        return frozenset(
            own if isinstance(self.model, ExportedProgram) else own | forwards(as_module(self.model))
        )

    def on_meta(self) -> bool:
        """Whether any tensor of the model has no storage."""
        state = (
            self.model.state_dict
            if isinstance(self.model, ExportedProgram)
            else as_module(self.model).state_dict()
        )
        return any(isinstance(t, Tensor) and t.is_meta for t in state.values())

    def runnable(self) -> tuple[Callable[..., Any], tuple[tuple[Any, ...], dict[str, Any]]] | None:
        """What a program is compared with, and the example to begin with; None for an exported program
        without one.
        """
        if not isinstance(self.model, ExportedProgram):
            return self.model, (self.args, self.kwargs)
        example = (self.args, self.kwargs) if self.args or self.kwargs else self.model.example_inputs
        return None if example is None else (self.model.module(check_guards=False), example)


def _polling(progress: Progress | None) -> Progress:
    """The user's `progress`, and before it the chance to be interrupted between stages."""

    def stage(name: str) -> None:
        poll()
        if progress:
            progress(name)

    return stage


def _request(
    model: Model,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    mode: CaptureMode,
) -> _Request:
    """Raises InputError when these cannot be a call."""
    if isinstance(model, Program):
        raise InputError("this program is compiled already: give the model it was compiled from")
    require_call(args, kwargs)
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise InputError(f"dynamic_shapes={dynamic_shapes!r}: give 'auto', None, or torch.export's own form")
    return _Request(model, tuple(args), dict(kwargs or {}), dynamic_shapes, mode)


def require_call(args: object, kwargs: object) -> None:
    """Raises InputError unless these are arguments by position and by name."""
    if not isinstance(args, (tuple, list)):
        raise InputError(
            f"args is a {type(args).__name__}: give the positional arguments as a tuple, args=(x,)"
        )
    if not isinstance(kwargs, (Mapping, type(None))):
        raise InputError(f"kwargs is a {type(kwargs).__name__}: give the arguments by name as a dict")


def _compiled(
    request: _Request,
    backend: str,
    steps: tuple[Pass, ...],
    verify: Verify,
    progress: Progress | None,
    exact: bool = False,
) -> Program:
    captured, first = _captured(request, exact, progress)
    chosen = choose(backend, captured.exported)
    random, against = is_random(captured.exported), request.runnable()
    held = _held(request, captured, progress)
    outcome = passes.run(ProgramGraph(captured.exported), steps, verify, progress)
    name_outputs(captured.exported)
    drop_leftovers(captured.exported)
    round_by_division(captured.exported)
    passed = (first, *outcome.passes)
    remarks = (*_told(captured, held), *outcome.remarks)
    report = Report(_name(request.model), captured.how, outcome.layers, passed, chosen, None, remarks)
    program = _lowered(captured, report, chosen, progress)
    if verify == "off" or random or against is None:
        return program
    if progress:
        progress("check")
    start = time.perf_counter()
    replayed = replay(against[0], program, program.inputs, against[1])
    if replayed.wrong:
        plain = _unfused(request, program, replayed.wrong, exact)
        replayed = replay(against[0], plain, plain.inputs, against[1])
        if replayed.wrong and not exact and plain.inputs.doubtful:
            return _compiled(request, backend, steps, verify, progress, exact=True)
        if replayed.wrong:
            raise CaptureError(
                f"cannot capture {report.model}: the graph gives other numbers than the model on "
                f"{replayed.wrong}; its code depends on values, sizes or earlier calls in a way "
                "that tracing does not see",
                "R103",
            )
        program = plain
    nodes = len(program.module.graph.nodes)
    check = PassReport("check", time.perf_counter() - start, nodes, nodes, False, replayed.error)
    report = program.report
    return program.with_report(replace(report, program_error=replayed.error, passes=(*report.passes, check)))


def _held(request: _Request, captured: Captured, progress: Progress | None) -> bool:
    """Whether what tracing assumed of the user's code was put to the test and held.

    A random program and one without an example cannot be tested. Raises CaptureError where it does not hold.
    """
    against = request.runnable()
    tested = captured.assumed or has_sizes_of_data(captured.exported)
    if not tested or against is None or is_random(captured.exported):
        return False
    if progress:
        progress("replay")
    name = _name(request.model)
    report = Report(name, captured.how, (), ())
    program = Program(captured.exported, captured.call, captured.outputs, report, "reference")
    wrong = replay_routings(against[0], program, program.inputs, against[1])
    if wrong:
        assumed = "; ".join(map(str, captured.assumed[:3]))
        why = (
            f"tracing assumed: {assumed}" if assumed else "its code depends on how many tokens an expert has"
        )
        raise CaptureError(
            f"cannot capture {name}: the graph gives other numbers than the model with {wrong}; {why}", "R102"
        )
    return True


def _told(captured: Captured, held: bool) -> tuple[str, ...]:
    """What was assumed, for the reader of the report."""
    return tuple(f"{_ASSUMED[held]}: {assumption}" for assumption in captured.assumed)


def _captured(request: _Request, exact: bool, progress: Progress | None) -> tuple[Captured, PassReport]:
    if progress:
        progress("capture")
    start = time.perf_counter()
    captured = request.captured(exact)
    nodes = len(captured.exported.graph.nodes)
    return captured, PassReport("capture", time.perf_counter() - start, 0, nodes, True, None)


def _lowered(captured: Captured, report: Report, backend: Backend, progress: Progress | None) -> Program:
    if progress:
        progress("lower")
    start = time.perf_counter()
    before = len(captured.exported.graph.nodes)
    program = Program(captured.exported, captured.call, captured.outputs, report, backend)
    program.prepare()
    nodes = len(program.module.graph.nodes)
    lowering = PassReport("lower", time.perf_counter() - start, before, nodes, nodes != before, None)
    report = replace(report, passes=(*report.passes, lowering))
    return program.with_report(_on_cpu(report, captured) if backend == "cpu" else report)


def _on_cpu(report: Report, captured: Captured) -> Report:
    """The report, saying what runs the fused layers on a CPU."""
    names = {layer.op: layer.name for layer in report.layers if layer.op}
    left = {name: why for group, why in not_native(ProgramGraph(captured.exported), names) for name in group}
    layers = tuple(
        replace(x, remarks=(*x.remarks, f"run by torch's operators on a CPU: {left[x.name]}"))
        if x.fused and x.name in left
        else x
        for x in report.layers
    )
    return replace(report, layers=layers, kernels=describe())


def _unfused(request: _Request, program: Program, wrong: str, exact: bool) -> Program:
    """The captured graph alone, every layer refused because the whole came out wrong."""
    plain = request.captured(exact)
    refusal = Refusal("R501", f"with it the program gives other numbers than the model ({wrong})")
    layers = tuple(
        replace(x, fused=False, spec=None, refusal=replace(refusal, source=x.source)) if x.fused else x
        for x in program.report.layers
    )
    report = replace(program.report, layers=layers)
    return Program(plain.exported, plain.call, plain.outputs, report, program.backend)


def _require_fused(report: Report) -> None:
    refused = tuple((x.name, x.refusal) for x in report.layers if not x.fused and x.refusal is not None)
    if refused:
        raise NotFused(refused)


def check_choices(**choices: tuple[object, Sequence[object]]) -> None:
    """Raise InputError unless each argument, by its name, is one of its choices."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def _name(model: Model) -> str:
    if isinstance(model, (nn.Module, ExportedProgram)):
        return type(model).__name__
    return getattr(model, "__name__", type(model).__name__)
