"""`dsmoe inspect`: what the compiler understands of a model, without compiling it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.inspect_load import inspect_load
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve
from dsmoe_compiler.cli.model_report import model_report
from dsmoe_compiler.cli.stages import Stage, load_modules, stages
from dsmoe_compiler.report.report import Report

if TYPE_CHECKING:
    from dsmoe_compiler.report.drawing.layer_graph import LayerAnatomy


@click.command("inspect", short_help="Show each MoE layer of MODEL, without compiling it.")
@click.argument("text", metavar="[MODEL]", required=False)
@input_option
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw one layer before and after into FILE.svg, FILE.html or FILE.dot.",
)
@click.option(
    "--layer",
    "wanted",
    metavar="NAME",
    help="Which layer: its name, or its number from 0. Without --graph its text is printed. Default for "
    "--graph: the first fused one.",
)
@click.option(
    "--load",
    "loads",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Show how many tokens each expert was given, as counted in Python by program.count_load(); with "
    "MODEL, check that its layers are those. Repeat it to add loads up.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report, the load or both as JSON.")
def inspect_model(
    text: str | None,
    inputs: tuple[ExampleInput, ...],
    graph: Path | None,
    wanted: str | None,
    loads: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Show each MoE layer of MODEL: its spec, or why it was not understood.

    Models of the zoo and of hf: are built without weights, so that any size fits. Of a .pt2 file the
    report it was saved with is shown. --load needs no MODEL.

    \b
    Examples:
      dsmoe inspect deepseek-moe-145b
      dsmoe inspect hf:./Mixtral-8x7B-v0.1
      dsmoe inspect my_package.model:forward --input x=2x16x512 --input ids=2x16:int64
      dsmoe inspect tiny.pt2 --json
      dsmoe inspect deepseek-moe-16b --layer model.layers.3.mlp
      dsmoe inspect deepseek-moe-16b --graph layer.html
      dsmoe inspect --load load.json
    """
    if loads:
        _require_alone(text, inputs, graph, wanted)
        inspect_load(loads, text, inputs, as_json)
        return
    if text is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    if wanted is not None and graph is None and as_json:
        raise click.UsageError("--layer prints text: leave out --json, or draw the layer with --graph.")
    if graph is not None:
        from dsmoe_compiler.cli.one_layer import require_drawing_place

        require_drawing_place(graph)
    with stages() as stage:
        if graph is None and wanted is None:
            (report, notes), anatomy = model_report(text, inputs, stage), None
        else:
            report, notes, anatomy = _anatomy(text, inputs, wanted, stage)
        if graph is not None and anatomy is not None:
            from dsmoe_compiler.cli.one_layer import write_drawing

            stage(f"draw {graph}")
            write_drawing(anatomy, graph)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if anatomy is not None and graph is None:
        click.echo(anatomy.text, nl=False)
        return
    _print(report, as_json)
    if anatomy is not None:
        click.echo(f"drew {anatomy.report.name or anatomy.model} into {graph}", err=as_json)


def _require_alone(
    text: str | None, inputs: tuple[ExampleInput, ...], graph: Path | None, wanted: str | None
) -> None:
    """Raise UsageError where --load meets what has no meaning beside it."""
    if graph is not None or wanted is not None:
        raise click.UsageError("--load shows all layers: leave out --graph and --layer.")
    if inputs and text is None:
        raise click.UsageError("--input is for MODEL, and there is none.")


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        click.echo(report.to_json())
        return
    from dsmoe_compiler.cli.paint import console, print_report

    print_report(console(), report)


def _anatomy(
    text: str, inputs: tuple[ExampleInput, ...], wanted: str | None, stage: Stage
) -> tuple[Report, tuple[str, ...], LayerAnatomy]:
    """The report, and one layer of it before and after."""
    if is_saved_program(text):
        raise click.UsageError(
            f"{text} is compiled: what its layers were is not in it. Give the model it was compiled from."
        )
    load_modules(stage, "dsmoe_compiler.api")
    from dsmoe_compiler import api
    from dsmoe_compiler.anatomy.watch import Anatomist
    from dsmoe_compiler.cli.one_layer import chosen_layer

    stage(f"build {text}")
    call, anatomist = resolve(text, inputs, with_weights=False), Anatomist()
    report = api.inspect(call.model, call.args, call.kwargs, progress=stage, instruments=(anatomist,))
    return report, call.notes, anatomist.layer(report, chosen_layer(report, wanted))
