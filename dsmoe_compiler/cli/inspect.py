"""`dsmoe inspect`: what the compiler understands of a model, without compiling it."""

from __future__ import annotations

from pathlib import Path

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve
from dsmoe_compiler.cli.stages import Stage, stages
from dsmoe_compiler.report.report import Report


@click.command("inspect", short_help="Show each MoE layer of MODEL, without compiling it.")
@click.argument("text", metavar="MODEL")
@input_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def inspect_model(text: str, inputs: tuple[ExampleInput, ...], as_json: bool) -> None:
    """Show each MoE layer of MODEL: its spec, or why it was not understood.

    Models of the zoo and of hf: are built without weights, so that any size fits. Of a .pt2 file the
    report it was saved with is shown.

    \b
    Examples:
      dsmoe inspect deepseek-moe-145b
      dsmoe inspect hf:./Mixtral-8x7B-v0.1
      dsmoe inspect my_package.model:forward --input x=2x16x512 --input ids=2x16:int64
      dsmoe inspect tiny.pt2 --json
    """
    with stages() as stage:
        report, notes = _report(text, inputs, stage)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(report.to_json())
        return
    from dsmoe_compiler.cli.paint import console, print_report

    print_report(console(), report)


def _report(text: str, inputs: tuple[ExampleInput, ...], stage: Stage) -> tuple[Report, tuple[str, ...]]:
    stage("load torch")
    from dsmoe_compiler import api, program

    if is_saved_program(text):
        if inputs:
            raise click.UsageError("--input has no meaning for a .pt2 file: it is not captured again.")
        stage(f"load {text}")
        return program.load(Path(text)).report, ()
    stage(f"build {text}")
    call = resolve(text, inputs, with_weights=False)
    return api.inspect(call.model, call.args, call.kwargs, progress=stage), call.notes
