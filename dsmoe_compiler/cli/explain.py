"""`dsmoe explain`: why a layer was not fused, and what it would take; how a fused one was understood."""

from __future__ import annotations

import json

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.model_report import model_report
from dsmoe_compiler.cli.stages import stages


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
        report, notes = model_report(text, inputs, stage)
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
