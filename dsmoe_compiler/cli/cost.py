"""`dsmoe cost`: parameters, FLOPs, bytes of weights, and the least time a step takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsmoe_compiler.cli.exit_status import REFUSED
from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.kernels_model import DTYPES, cast_call
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve
from dsmoe_compiler.cli.stages import Stage, load_modules, stages

if TYPE_CHECKING:
    from dsmoe_compiler.cost_model.cost import Cost

USUAL_GPU = "H200"


@click.command("cost", short_help="Count parameters, FLOPs and bytes of MODEL.")
@click.argument("text", metavar="[MODEL]", required=False)
@input_option
@click.option(
    "--seq",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens of a sequence. [default: 4096, or the most MODEL takes]",
)
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Sequences. [default: 1]")
@click.option(
    "--gpu", metavar="NAME", help=f"Time a step on H100, H200, A100, 4090 or MI300X. [default: {USUAL_GPU}]"
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast MODEL first. [default: as it is]")
@click.option(
    "--paper",
    is_flag=True,
    help="Hold the models of the DeepSeekMoE paper against its tables; with MODEL only that one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def cost(
    text: str | None,
    inputs: tuple[ExampleInput, ...],
    seq: int | None,
    batch: int | None,
    gpu: str | None,
    dtype: str | None,
    paper: bool,
    as_json: bool,
) -> None:
    """Count what MODEL costs, from its graph: parameters held and activated by one token, FLOPs of a forward
    and of training as the DeepSeekMoE paper counts, the weights' bytes that a step reads, and the least time
    that takes on a GPU. Nothing is run.

    With --paper, the paper's own models: exit status 1 when a figure of its tables is missed.

    \b
    Examples:
      dsmoe cost deepseek-moe-16b --dtype bfloat16
      dsmoe cost hf:./Mixtral-8x7B-v0.1 --seq 1 --batch 32 --gpu A100
      dsmoe cost my_package.model:forward --input x=64x512 --json
      dsmoe cost --paper
    """
    if paper:
        given = {"--seq": seq, "--batch": batch, "--gpu": gpu, "--dtype": dtype, "--input": inputs or None}
        for option, value in given.items():
            if value is not None:
                raise click.UsageError(f"--paper has its own sizes: leave out {option}.")
        _paper(text, as_json)
        return
    if text is None:
        raise click.UsageError("give a MODEL, or --paper.")
    with stages() as stage:
        found, notes = _cost(text, inputs, seq, batch or 1, gpu or USUAL_GPU, dtype, stage)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(found.to_json())
        return
    from dsmoe_compiler.cli.cost_table import print_cost

    print_cost(found)


def _cost(
    text: str,
    inputs: tuple[ExampleInput, ...],
    seq: int | None,
    batch: int,
    gpu: str,
    dtype: str | None,
    stage: Stage,
) -> tuple[Cost, tuple[str, ...]]:
    """The cost, and what the user should be told of how the model was built."""
    load_modules(stage, "dsmoe_compiler.api")
    from dsmoe_compiler import api, program
    from dsmoe_compiler.runtime.gpu_catalogue import named

    named(gpu)  # a wrong name is told before the long work
    if is_saved_program(text):
        for option, given in (("--input", inputs), ("--dtype", dtype)):
            if given:
                raise click.UsageError(f"{option} has no meaning for a .pt2 file: it is not captured again.")
        stage(f"load {text}")
        return api.cost(program.load(Path(text)), batch=batch, seq=seq, gpu=gpu), ()
    stage(f"build {text}")
    call = resolve(text, inputs, with_weights=False)
    if dtype is not None:
        call = cast_call(text, call, dtype)
    found = api.cost(call.model, call.args, call.kwargs, batch=batch, seq=seq, gpu=gpu, progress=stage)
    return found, call.notes


def _paper(text: str | None, as_json: bool) -> None:
    from dsmoe_compiler.cli.cost_paper import checked_against_paper

    if not checked_against_paper(text, as_json):
        click.get_current_context().exit(REFUSED)
