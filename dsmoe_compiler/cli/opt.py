"""`dsmoe opt`: passes over a model's graph, and everything one may want to see of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.optimize import Capture, Optimized, Options, Remarks, Verify, Watched, optimize
from dsmoe_compiler.cli.output_file import require_text_place, write_text
from dsmoe_compiler.cli.stages import load_modules, stages


@click.command("opt", short_help="Run chosen passes over MODEL's graph and print it.")
@click.argument("text", metavar="MODEL", required=False)
@click.option(
    "--passes",
    "pipeline",
    metavar="PIPELINE",
    help='Passes in order, options in braces: "lift_experts,some_pass{count=4 exact=true}". "" runs none. '
    "[default: the default pipeline]",
)
@click.option("--list-passes", is_flag=True, help="List the passes with their options, and end.")
@click.option("--dump-pipeline", is_flag=True, help="Print the pipeline, every option spelled out, and end.")
@click.option(
    "--print-ir-before",
    "before",
    metavar="PASS",
    multiple=True,
    help="Print the graph before PASS. Repeatable.",
)
@click.option(
    "--print-ir-after", "after", metavar="PASS", multiple=True, help="Print the graph after PASS. Repeatable."
)
@click.option("--print-ir-after-all", "after_all", is_flag=True, help="Print the graph after every pass.")
@click.option(
    "--print-ir-after-change", "after_change", is_flag=True, help="Only after passes that changed the graph."
)
@click.option(
    "--ir-tree-dir",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write these graphs to DIR, a numbered file each; alone, after every pass.",
)
@click.option("--layer", metavar="NAME", help="Print only this module's part: model.layers.1.mlp.")
@click.option("--timing", is_flag=True, help="Seconds and share of each pass.")
@click.option("--stats", is_flag=True, help="Nodes, layers and replacements of each pass.")
@click.option(
    "--remarks", type=click.Choice(get_args(Remarks)), help="What each pass did to each layer, a line each."
)
@click.option(
    "--verify",
    type=click.Choice(get_args(Verify)),
    help="Check every rewrite on numbers, which needs the weights. "
    "[default: numeric, but off for the zoo and hf:, which numeric builds with weights]",
)
@click.option(
    "--capture",
    type=click.Choice(get_args(Capture)),
    default="auto",
    show_default=True,
    help="auto may switch a transformers model to its exportable experts while capturing.",
)
@input_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the graph goes; - is stdout.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print tables, remarks and the graph as one JSON record."
)
def opt(
    text: str | None,
    pipeline: str | None,
    list_passes: bool,
    dump_pipeline: bool,
    timing: bool,
    stats: bool,
    remarks: Remarks | None,
    inputs: tuple[ExampleInput, ...],
    output: Path | None,
    as_json: bool,
    **others: Any,
) -> None:
    """Run passes over MODEL's captured graph and print what it is then.

    The graph goes to stdout; everything else to stderr: graphs between passes, remarks, tables. Nothing is
    lowered or saved, and a layer that is refused is no error.

    \b
    Examples:
      dsmoe opt deepseek-moe-16b --layer model.layers.1.mlp
      dsmoe opt deepseek-moe-tiny --passes "normalize,lift_experts" --print-ir-after-change
      dsmoe opt my_package.model:build --remarks=missed -o /dev/null
      dsmoe opt tiny.pt2 --passes ""
    """
    if list_passes:
        _list_passes(as_json)
        return
    if dump_pipeline:
        _dump_pipeline(pipeline)
        return
    if text is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    output = None if output == Path("-") else output
    if output is not None:
        require_text_place(output)
    watched = Watched()
    try:
        with stages() as stage:
            done = optimize(text, inputs, Options(pipeline=pipeline, **others), watched, stage)
    finally:
        _print_watched(watched, None if as_json else remarks)
    if output is not None:
        write_text(output, done.ir)
    if as_json:
        click.echo(json.dumps(_record(done, watched, remarks or "all", output), indent=2))
        return
    if output is None:
        click.echo(done.ir, nl=False)
    _print_tables(done, watched, timing, stats)


def _list_passes(as_json: bool) -> None:
    with stages() as stage:
        load_modules(stage, "dsmoe_compiler.pipeline")
        from dsmoe_compiler.cli.pass_tables import listing, listing_records
        from dsmoe_compiler.pipeline import DEFAULT, PASSES
        from dsmoe_compiler.pipeline_text import print_pipeline
    if as_json:
        record = {"passes": listing_records(PASSES), "default": print_pipeline(DEFAULT)}
        click.echo(json.dumps(record, indent=2))
        return
    click.echo("\n".join(listing(PASSES)))
    click.echo(f"\ndefault pipeline: {print_pipeline(DEFAULT)}")


def _dump_pipeline(pipeline: str | None) -> None:
    with stages() as stage:
        load_modules(stage, "dsmoe_compiler.pipeline")
        from dsmoe_compiler.pipeline import steps_of
        from dsmoe_compiler.pipeline_text import print_pipeline
    click.echo(print_pipeline(steps_of(pipeline)))


def _print_watched(watched: Watched, remarks: Remarks | None) -> None:
    """What is worth reading also where the run ended in an error: graphs, then remarks, on stderr."""
    for note in watched.notes:
        click.echo(f"note: {note}", err=True)
    for dump in watched.dumps:
        click.echo(dump, err=True)
    for remark in watched.remarks(remarks) if remarks else ():
        click.echo(str(remark), err=True)


def _print_tables(done: Optimized, watched: Watched, timing: bool, stats: bool) -> None:
    from dsmoe_compiler.cli import pass_tables
    from dsmoe_compiler.cli.paint import console, print_grid

    to = console(stderr=True)
    if stats:
        to.print()
        print_grid(to, pass_tables.statistics(watched.runs))
    if timing:
        to.print()
        print_grid(to, pass_tables.timing(done.capture_seconds, watched.runs))


def _record(done: Optimized, watched: Watched, remarks: Remarks, output: Path | None) -> dict[str, Any]:
    """Everything as one record: the graph is in it, or the name of its file."""
    from dsmoe_compiler.cli.pass_tables import as_records

    return {
        "pipeline": done.pipeline,
        "passes": as_records(done.capture_seconds, watched.runs),
        "remarks": [asdict(remark) for remark in watched.remarks(remarks)],
        **({"ir": done.ir} if output is None else {"output": str(output)}),
    }
