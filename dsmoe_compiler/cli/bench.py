"""`dsmoe bench`: a whole model as it is, under torch.compile, and compiled by us, at several lengths."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from dsmoe_compiler.cli.bench_options import TOKENS, Options
from dsmoe_compiler.cli.bench_table import Benchmark, print_benchmark
from dsmoe_compiler.cli.exit_status import REFUSED
from dsmoe_compiler.cli.input_option import input_option
from dsmoe_compiler.cli.kernels_model import DTYPES
from dsmoe_compiler.cli.model_argument import is_saved_program, weight_bytes
from dsmoe_compiler.cli.stages import Stage, load_modules, stages
from dsmoe_compiler.ir.errors import InputError

EXPERTS = ("eager", "grouped_mm")  # batched_mm copies the weights of every pair: gigabytes at a few hundred


def _numbers(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...]:
    """The numbers of `--tokens 1,128`, each once."""
    if text is None:
        return ()
    found = [each.strip() for each in text.split(",")]
    if any(not each.isdecimal() or not 0 < int(each) < 1 << 24 for each in found):
        raise click.BadParameter(f"{text!r} is not of the form 1,128,1024.")
    return tuple(dict.fromkeys(map(int, found)))


@click.command("bench", short_help="Measure MODEL as it is, under torch.compile, and compiled.")
@click.argument("text", metavar="MODEL")
@input_option
@click.option(
    "-T",
    "--tokens",
    metavar="N,N,…",
    callback=_numbers,
    help=f"Tokens of a sequence. [default: {','.join(map(str, TOKENS))}, or those of them that MODEL takes]",
)
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Sequences. [default: 1]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast MODEL first. [default: as it is]")
@click.option(
    "--experts",
    type=click.Choice(EXPERTS),
    help="How transformers runs the eager model's experts. [default: as the model says]",
)
@click.option("--torch-compile/--no-torch-compile", default=True, help="Measure torch.compile, too (or not).")
@click.option(
    "--compile-limit",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Go on without torch.compile where it takes longer for one number of tokens.",
)
@click.option(
    "--rounds", type=click.IntRange(1), metavar="N", help="So many rounds, however long; else --seconds."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to measure each number of tokens, but for five rounds at least.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads. [default: torch's]")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(text: str, as_json: bool, **options: Any) -> None:
    """Measure forwards of MODEL on this machine: as it is, under torch.compile, and compiled by dsmoe.

    All take turns on sequences of random ids, and the calmer half of the rounds counts. Every answer is
    compared with eager's first: exit status 1 when one is wrong. Models of the zoo have random weights, and
    so have hf: folders without any. A model that takes no ids is measured on its example inputs.

    \b
    Examples:
      dsmoe bench deepseek-moe-demo
      dsmoe bench hf:./Qwen3-30B-A3B --tokens 1,512 --threads 16
      dsmoe bench my_package.model:build --no-torch-compile --json
      dsmoe bench my_package.layer:forward --input x=128x512
    """
    given = Options(**options)
    if is_saved_program(text):
        raise InputError(
            f"{text} holds no eager model to compare with: give the MODEL that it was compiled from"
        )
    with stages() as stage:
        found = _benchmark(text, given, stage)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    print_benchmark(found, as_json)
    for line in found.wrong:
        click.echo(f"dsmoe: {line}", err=True)
    if found.wrong:
        click.get_current_context().exit(REFUSED)


def _benchmark(text: str, options: Options, stage: Stage) -> Benchmark:
    load_modules(stage, "dsmoe_compiler.api", "dsmoe_compiler.cli.bench_run")
    import torch

    from dsmoe_compiler import api
    from dsmoe_compiler.cli.bench_inputs import workloads
    from dsmoe_compiler.cli.bench_model import dtype_of, experts_of, model_to_measure
    from dsmoe_compiler.cli.bench_run import Runner

    with _threads(options.threads):
        stage(f"build {text}")
        call = model_to_measure(text, options)
        loads = workloads(text, call, options)
        start = time.perf_counter()
        program = api.compile(call.model, call.args, call.kwargs, progress=stage)
        compile_seconds = time.perf_counter() - start
        runner = Runner(text, call.model, program, options, stage)
        with torch.no_grad():
            found = [runner.measured(load) for load in loads]
        return Benchmark(
            model=text,
            dtype=dtype_of(call.model),
            weight_bytes=weight_bytes(call.model),
            threads=torch.get_num_threads(),
            experts=experts_of(call.model) if program.report.layers else None,
            report=program.report,
            compile_seconds=compile_seconds,
            torch_compile_seconds=runner.torch_seconds if options.torch_compile else None,
            measurements=tuple(each for each in found if each is not None),
            notes=(*call.notes, *runner.notes),
        )


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads of torch's inside, where a number is given."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
