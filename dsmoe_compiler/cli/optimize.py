"""One run of a pipeline as the command line asks for it, and what is seen of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from dsmoe_compiler.cli.input_option import ExampleInput
from dsmoe_compiler.cli.model_argument import device_of, is_saved_program, resolve
from dsmoe_compiler.cli.output_file import require_folder
from dsmoe_compiler.cli.stages import Stage, load_modules
from dsmoe_compiler.ir.errors import InputError

if TYPE_CHECKING:
    from dsmoe_compiler.cli.ir_dumps import Dump, Moments
    from dsmoe_compiler.instrument import Instrument, PassRun
    from dsmoe_compiler.ir.graph import ProgramGraph
    from dsmoe_compiler.ir.passes import Pass
    from dsmoe_compiler.report.remarks import PassRemark

Verify: TypeAlias = Literal["numeric", "off"]
Capture: TypeAlias = Literal["auto", "as_written"]
Remarks: TypeAlias = Literal["missed", "passed", "all"]


@dataclass(frozen=True)
class Options:
    """What is to be done: the pipeline's text (None: the default one), and when its graph is shown.

    `verify` is None where the user did not say. `before` and `after` are names of passes, `folder` where the
    graphs between passes go instead of stderr, `layer` the module they and the last one are cut down to.
    """

    pipeline: str | None
    verify: Verify | None
    capture: Capture
    layer: str | None
    before: tuple[str, ...]
    after: tuple[str, ...]
    after_all: bool
    after_change: bool
    folder: Path | None


@dataclass
class Watched:
    """What is known when a run ends, also when it ends in an error; an instrument of the pipeline.

    `dumps` are the graphs between passes that go to stderr, `assumed` what capture took for granted.
    """

    notes: list[str] = field(default_factory=list)
    dumps: list[str] = field(default_factory=list)
    assumed: list[PassRemark] = field(default_factory=list)
    runs: list[PassRun] = field(default_factory=list)

    def before(self, step: Pass, graph: ProgramGraph) -> None:
        """As Instrument.before."""

    def after(self, step: Pass, graph: ProgramGraph, run: PassRun) -> None:
        """As Instrument.after."""
        self.runs.append(run)

    def remarks(self, which: Remarks) -> Iterator[PassRemark]:
        """Those of capture and all passes, in order."""
        told = (self.assumed, *(run.remarks for run in self.runs))
        return (remark for remarks in told for remark in remarks if which in ("all", remark.kind))


@dataclass(frozen=True)
class Optimized:
    """The text of a graph after a pipeline, the pipeline's own with every option spelled out, and how long
    capture took.
    """

    pipeline: str
    ir: str
    capture_seconds: float


def optimize(
    text: str, inputs: tuple[ExampleInput, ...], options: Options, watched: Watched, stage: Stage
) -> Optimized:
    """Capture MODEL and run the passes over its graph.

    Raises InputError when MODEL, a pass, an option or the folder is not what the user believes, and what
    capture and passes raise.
    """
    load_modules(stage, "dsmoe_compiler.api")
    from dsmoe_compiler import api
    from dsmoe_compiler.cli.ir_dumps import IRDumps, ModuleCheck, shower
    from dsmoe_compiler.pipeline import steps_of
    from dsmoe_compiler.pipeline_text import print_pipeline
    from dsmoe_compiler.report.remarks import PassRemark

    steps = steps_of(options.pipeline)
    moments, dump, show = _moments(options, steps, watched), _dump(options, watched), shower(options.layer)
    stage(f"build {text}")
    model, args, kwargs = _model(text, inputs, options.verify, watched)
    check = ModuleCheck(options.layer)
    instruments: list[Instrument] = [check, watched]
    if moments:
        instruments.append(IRDumps(moments, show, dump))
    done = api.optimize(
        model,
        args,
        kwargs,
        capture=options.capture,
        pipeline=steps,
        verify=options.verify or "numeric",
        progress=stage,
        instruments=instruments,
    )
    check(done.graph)
    watched.assumed.extend(
        PassRemark("analysis", "capture", "", f"{done.how_assumed}: {each.text}", each.source)
        for each in done.assumed
    )
    return Optimized(print_pipeline(steps), show(done.graph), done.report.passes[0].seconds)


def _model(
    text: str, inputs: tuple[ExampleInput, ...], verify: Verify | None, watched: Watched
) -> tuple[Any, tuple[object, ...], dict[str, object]]:
    """What is captured, and how it is called. Models of the zoo and of hf: get weights only where numeric
    verification is asked for.
    """
    if is_saved_program(text):
        from dsmoe_compiler.program import load

        if inputs:
            raise click.UsageError("--input has no meaning for a .pt2 file: its shapes are in it.")
        return load(Path(text)).exported, (), {}
    call = resolve(text, inputs, with_weights=verify == "numeric")
    if verify == "numeric" and device_of(call.model) == "meta":
        raise InputError(f"{text} is on the meta device, without weights to check on: leave --verify out")
    watched.notes.extend(call.notes)
    return call.model, call.args, call.kwargs


def _moments(options: Options, steps: Sequence[Pass], watched: Watched) -> Moments:
    """When the graph is shown. Raises InputError for names of no pass; passes that do not run get a note."""
    from dsmoe_compiler.cli.ir_dumps import Moments
    from dsmoe_compiler.nearest import unknown
    from dsmoe_compiler.pipeline import PASSES

    for option, names in (("--print-ir-before", options.before), ("--print-ir-after", options.after)):
        for name in names:
            if name not in PASSES:
                raise InputError(f"{option}: {unknown('pass', name, PASSES)}")
            if name not in {step.name for step in steps}:
                watched.notes.append(f"{option} {name} prints nothing: it is not in the pipeline")
    asked = options.before or options.after or options.after_all or options.after_change
    after_all = options.after_all or (options.folder is not None and not asked)
    return Moments(frozenset(options.before), frozenset(options.after), after_all, options.after_change)


def _dump(options: Options, watched: Watched) -> Dump:
    """Where the graphs between passes go. Raises InputError when that cannot be written."""
    from dsmoe_compiler.cli.ir_dumps import DumpFolder

    if options.folder is None:
        return lambda moment, step, text: watched.dumps.append(text)
    require_folder(options.folder)
    return DumpFolder(options.folder)
