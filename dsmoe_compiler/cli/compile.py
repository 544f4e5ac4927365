"""`dsmoe compile`: a model in, a `.pt2` file out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.memory import readable, require_disk
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve, weight_bytes
from dsmoe_compiler.cli.output_file import require_writable
from dsmoe_compiler.cli.stages import Stage, load_modules, stages
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.report import Report

Backend = Literal["auto", "cpu", "triton", "reference"]
Verify = Literal["numeric", "off"]
Capture = Literal["auto", "as_written"]


@dataclass(frozen=True)
class Options:
    """What the command's options say, as the API takes it."""

    backend: Backend
    verify: Verify
    capture: Capture
    require_fused: bool


@dataclass(frozen=True)
class Written:
    """A program that lies in a file now: what it is, and the seconds from MODEL to file."""

    report: Report
    path: Path
    seconds: float
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


@click.command("compile", short_help="Compile MODEL and write it to a .pt2 file.")
@click.argument("text", metavar="MODEL")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.pt2",
    help="Where to write the program.",
)
@click.option(
    "--backend",
    type=click.Choice(get_args(Backend)),
    default="auto",
    show_default=True,
    help="What runs the MoE layers; auto chooses by the model's device.",
)
@click.option(
    "--verify",
    type=click.Choice(get_args(Verify)),
    default="numeric",
    show_default=True,
    help="Check every rewrite against what it replaces, and the program against the model.",
)
@click.option(
    "--capture",
    type=click.Choice(get_args(Capture)),
    default="auto",
    show_default=True,
    help="auto may switch a transformers model to its exportable experts while capturing.",
)
@click.option(
    "--require-fused", is_flag=True, help="Exit with 1, writing nothing, unless every MoE layer fuses."
)
@input_option
@click.option("--json", "as_json", is_flag=True, help="Print the report and the file's size as JSON.")
def compile_model(
    text: str,
    output: Path,
    backend: Backend,
    verify: Verify,
    capture: Capture,
    require_fused: bool,
    inputs: tuple[ExampleInput, ...],
    as_json: bool,
) -> None:
    """Compile MODEL and write the program, weights included, to a .pt2 file.

    Load it in Python with dsmoe_compiler.load(FILE). Models of the zoo have random weights, and so have hf:
    folders without any.

    \b
    Examples:
      dsmoe compile deepseek-moe-tiny -o tiny.pt2
      dsmoe compile hf:./Mixtral-8x7B-v0.1 -o mixtral.pt2 --require-fused
      dsmoe compile my_package.model:build -o mine.pt2 --input x=2x16x512
    """
    require_writable(output)
    if is_saved_program(text):
        raise InputError(f"{text} is compiled already; `dsmoe inspect {text}` shows what is in it")
    with stages() as stage:
        written = _compile(text, output, inputs, Options(backend, verify, capture, require_fused), stage)
    for note in written.notes:
        click.echo(f"note: {note}", err=True)
    _print_json(written) if as_json else _print(written)


def _compile(
    text: str, output: Path, inputs: tuple[ExampleInput, ...], options: Options, stage: Stage
) -> Written:
    start = time.perf_counter()
    load_modules(stage, "dsmoe_compiler.api")
    from dsmoe_compiler import api

    stage(f"build {text}")
    call = resolve(text, inputs, with_weights=True)
    require_disk(weight_bytes(call.model), output)
    program = api.compile(
        call.model,
        call.args,
        call.kwargs,
        backend=options.backend,
        verify=options.verify,
        capture=options.capture,
        require_fused=options.require_fused,
        progress=stage,
    )
    stage(f"write {output}")
    program.save(output)
    return Written(program.report, output, time.perf_counter() - start, call.notes)


def _print_json(written: Written) -> None:
    record = {
        "output": str(written.path),
        "bytes": written.size,
        "seconds": round(written.seconds, 3),
        "report": json.loads(written.report.to_json()),
    }
    click.echo(json.dumps(record, indent=2))


def _print(written: Written) -> None:
    from dsmoe_compiler.cli.paint import console, print_report

    to = console()
    print_report(to, written.report)
    to.print()
    to.print(f"wrote {written.path}, {readable(written.size)}, in {written.seconds:.1f} s")
