"""`dsmoe kernels`: the Triton kernels that are generated for a model's layers, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, get_args

import click

from dsmoe_compiler.cli.input_option import ExampleInput, input_option
from dsmoe_compiler.cli.kernels_emit import Emit, Wanted, emitted, require_stage
from dsmoe_compiler.cli.kernels_model import DTYPES, fused_model, load_kernels
from dsmoe_compiler.cli.kernels_table import plans_of
from dsmoe_compiler.cli.kernels_tune import bench_here, tunings
from dsmoe_compiler.cli.output_file import require_text_place
from dsmoe_compiler.cli.stages import stages

BUCKETS = (1, 8, 64, 512, 4096, 16384)
MOST_TOKENS = 1 << 24


class Answer(Protocol):
    """What a run of the command found, to be printed when the work is over."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told beside it."""

    def print(self, as_json: bool) -> None:
        """To stdout, or where the user wants it."""


@click.command("kernels", short_help="Show the Triton kernels for the layers of MODEL.")
@click.argument("text", metavar="MODEL")
@input_option
@click.option(
    "-T",
    "--tokens",
    type=click.IntRange(1, MOST_TOKENS),
    multiple=True,
    metavar="N",
    help="Tokens of a call; repeatable. [default: 1 8 64 512 4096 16384; with --emit 4096]",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast MODEL first. [default: as it is]")
@click.option("--gpu", "gpu_name", metavar="NAME", help="Plan for this GPU: H100, H200, A100, MI300X, …")
@click.option(
    "--arch",
    metavar="TARGET",
    help="Plan and compile for sm_80, sm_90, gfx942, … [default: the GPU at hand, else sm_90]",
)
@click.option(
    "--emit",
    type=click.Choice(get_args(Emit)),
    help="Print a layer's module of kernels, what each is compiled to, or what each takes of the GPU.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="Measure the most promising plans on the GPU at hand, check what they compute, and keep the fastest "
    "for all later runs.",
)
@click.option("--layer", "wanted", metavar="NAME", help="Only this layer: its name, or its number from 0.")
@click.option("--kernel", metavar="NAME", help="With --emit: only this kernel.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --emit: where the text goes; - is stdout.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
def kernels(
    text: str,
    inputs: tuple[ExampleInput, ...],
    tokens: tuple[int, ...],
    dtype: str | None,
    gpu_name: str | None,
    arch: str | None,
    emit: Emit | None,
    tune: bool,
    wanted: str | None,
    kernel: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Show which kernels run each fused layer of MODEL, for several numbers of tokens: tiles, warps, stages,
    what the analytical model expects, and where the plan comes from. Layers that are alike are shown once.

    With --emit, the kernels themselves. Needs no GPU; models of the zoo and of hf: are built without weights.

    \b
    Examples:
      dsmoe kernels deepseek-moe-16b --dtype bfloat16 --gpu H100
      dsmoe kernels my_package.model:build -T 1 -T 16 --arch sm_80 --json
      dsmoe kernels deepseek-moe-16b --dtype bfloat16 --emit triton -T 4096 -o layer.py
      dsmoe kernels deepseek-moe-16b --dtype bfloat16 --emit resources --arch gfx942
      dsmoe kernels deepseek-moe-tiny --emit ptx -T 1 --kernel decode_up
      dsmoe kernels deepseek-moe-16b --dtype bfloat16 --tune -T 1 -T 4096
    """
    output = None if output == Path("-") else output
    _require_sense(emit, kernel, output, tokens, as_json)
    if tune and (emit or arch or gpu_name):
        raise click.UsageError("--tune measures the GPU at hand: leave out --emit, --arch and --gpu.")
    if output is not None:
        require_text_place(output)
    with stages() as stage:
        load_kernels(stage)
        from dsmoe_compiler.runtime.kernels import gpu_for

        bench = bench_here() if tune else None
        gpu = gpu_for(arch, gpu_name)
        if emit is not None:
            require_stage(gpu, emit)
        model = fused_model(text, inputs, dtype, stage)
        if wanted is not None:
            model = model.only(wanted)
        if bench is not None:
            answer: Answer = tunings(model, tokens or BUCKETS, bench, stage)
        elif emit is None:
            answer = plans_of(model, tokens or BUCKETS, gpu, stage)
        else:
            answer = emitted(model, Wanted(emit, tokens or (4096,), kernel, output), gpu, stage)
    for note in (*model.notes, *answer.notes):
        click.echo(f"note: {note}", err=True)
    answer.print(as_json)


def _require_sense(
    emit: Emit | None, kernel: str | None, output: Path | None, tokens: tuple[int, ...], as_json: bool
) -> None:
    """Raise UsageError for options that say nothing together."""
    if emit is None:
        for option, given in (("--kernel", kernel), ("-o", output)):
            if given is not None:
                raise click.UsageError(f"{option} needs --emit.")
    elif emit != "resources":
        if as_json:
            raise click.UsageError(f"--emit {emit} prints text: leave out --json.")
        if len(tokens) > 1:
            raise click.UsageError(f"--emit {emit} prints one module: give one -T.")
