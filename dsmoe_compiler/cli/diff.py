"""`dsmoe diff`: what differs between two graphs."""

from __future__ import annotations

import json

import click

from dsmoe_compiler.cli.diff_sides import sides
from dsmoe_compiler.cli.exit_status import REFUSED
from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.stages import stages

DIFFER = REFUSED  # as git and diff say it


@click.command("diff", short_help="Compare two graphs: operators, MoE layers, tensors, sizes.")
@click.argument("first", metavar="A")
@click.argument("second", metavar="[B]", required=False)
@input_option
@click.option(
    "--exit-code", "tell_status", is_flag=True, help="Exit with 1 if they differ, as git diff does."
)
@click.option(
    "--contents",
    "all_contents",
    is_flag=True,
    help="Compare the numbers of every tensor. [default: up to 1 GiB of them, the smallest tensors first]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON, every name in full.")
def diff(
    first: str,
    second: str | None,
    inputs: tuple[ExampleInput, ...],
    tell_status: bool,
    all_contents: bool,
    as_json: bool,
) -> None:
    """Compare graph A with graph B: operators, MoE layers, tensors, inputs and outputs, sizes.

    Each is an .onnx file, of any exporter; a .pt2 file of `dsmoe compile`; or a MODEL, which stands for its
    captured graph before any pass. A MODEL alone is compared with what the passes make of it. Nothing is
    run, and data beside an .onnx file is not loaded. The exit status is 0 also where they differ.

    \b
    Examples:
      dsmoe diff deepseek-moe-16b
      dsmoe diff deepseek-moe-tiny tiny.pt2
      dsmoe diff before.onnx after.onnx --exit-code
      dsmoe diff my_package.model:build mine.onnx --input x=2x16x512 --json
    """
    with stages() as stage:
        both = sides(first, second, inputs, stage)
        from dsmoe_compiler.graph_diff.compare import compare
        from dsmoe_compiler.graph_diff.tensor_changes import USUAL_BYTES

        stage("compare")
        found = compare(both.a, both.b, None if all_contents else USUAL_BYTES)
    for note in both.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        from dsmoe_compiler.graph_diff.record import as_record

        click.echo(json.dumps(as_record(found), indent=2))
    else:
        from dsmoe_compiler.cli.diff_table import print_diff

        print_diff(found)
    if tell_status and not found.same:
        click.get_current_context().exit(DIFFER)
