"""`dsmoe explain`: why a layer was not fused, and what it would take; how a fused one was understood."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve
from dsmoe_compiler.cli.stages import Stage, load_modules, stages
from dsmoe_compiler.report.report import Report


@click.command("explain", short_help="Say why layers of MODEL are not fused, and what it would take.")
@click.argument("text", metavar="MODEL")
@input_option
@click.option(
    "--layer",
    "wanted",
    metavar="NAME",
    help="Only this layer, fused or not: its name, or its number from 0. Default: all that are not fused.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def explain(text: str, inputs: tuple[ExampleInput, ...], wanted: str | None, as_json: bool) -> None:
    """Say of each layer of MODEL that is not fused which value's meaning was lost first, at which of your
    lines, how far the layer was understood before, which known spelling is nearest, and what it would take.

    Models of the zoo and of hf: are built without weights, so that any size fits. Of a .pt2 file the report
    it was saved with is explained.

    \b
    Examples:
      dsmoe explain my_package.model:build
      dsmoe explain my_package.model:forward --input x=2x16x512 --layer 0
      dsmoe explain hf:./my_checkpoint --layer model.layers.3.mlp
      dsmoe explain tiny.pt2 --json
    """
    with stages() as stage:
        report, notes = _report(text, inputs, stage)
    from dsmoe_compiler.cli.one_layer import chosen_layer
    from dsmoe_compiler.report.explained import group, records

    layers = [layer for layer in report.layers if not layer.fused]
    if wanted is not None:
        name = chosen_layer(report, wanted)
        layers = [layer for layer in report.layers if layer.name == name]
    for note in notes:
        click.echo(f"note: {note}", err=True)
    alike = group(layers)
    if as_json:
        entries = json.loads(report.to_json())["layers"]
        record = {"model": report.model, "fused": report.fused, "of": len(report.layers)}
        click.echo(json.dumps({**record, "explained": records(alike, entries)}, indent=2))
        return
    from dsmoe_compiler.cli.paint import console, print_explanation

    print_explanation(console(), report, alike)


def _report(text: str, inputs: tuple[ExampleInput, ...], stage: Stage) -> tuple[Report, tuple[str, ...]]:
    load_modules(stage, "dsmoe_compiler.api")
    from dsmoe_compiler import api, program

    if is_saved_program(text):
        if inputs:
            raise click.UsageError("--input has no meaning for a .pt2 file: it is not captured again.")
        stage(f"load {text}")
        return program.load(Path(text)).report, ()
    stage(f"build {text}")
    call = resolve(text, inputs, with_weights=False)
    return api.inspect(call.model, call.args, call.kwargs, progress=stage), call.notes
