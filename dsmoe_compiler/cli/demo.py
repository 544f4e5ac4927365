"""`dsmoe demo`: the whole story on one model that fits a laptop."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import click

from dsmoe_compiler.cli.measure import interleaved
from dsmoe_compiler.cli.stages import Stage, load_modules, stages
from dsmoe_compiler.report.grid import Column, Grid, Row
from dsmoe_compiler.report.report import Report

MODEL = "deepseek-moe-demo"
TOKENS = (1, 16, 128, 1024)
BUDGET_SECONDS = 6.0  # for each number of tokens
MOST_ROUNDS = 100
TOLERANCE = 1e-3  # relative; float32 sums in another order stay far below it


@dataclass(frozen=True)
class Comparison:
    """Eager against compiled on one sequence of `tokens` tokens, in median milliseconds.

    `ratio` is how many times faster the compiled program is, the median of the rounds' own ratios. `error` is
    the largest difference of the outputs over the largest value.
    """

    tokens: int
    eager_ms: float
    compiled_ms: float
    ratio: float
    rounds: int
    error: float


@dataclass(frozen=True)
class Demo:
    """Everything the demo shows; `compile_seconds` does not include building the model."""

    report: Report
    compile_seconds: float
    threads: int
    comparisons: tuple[Comparison, ...]

    @property
    def error(self) -> float:
        """The largest relative error against eager."""
        return max(each.error for each in self.comparisons)


@click.command("demo", short_help="Compile a DeepSeekMoE model here and show what happened.")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def demo(as_json: bool) -> None:
    """Compile a DeepSeekMoE model on this machine and show what happened.

    It takes about a minute, and needs half a gigabyte of memory.

    \b
    Example:
      dsmoe demo
    """
    with stages() as stage:
        result = _run(stage)
    _print_json(result) if as_json else _print(result)
    if not result.error <= TOLERANCE:
        raise RuntimeError(f"the compiled program is off by {result.error:.1e}, more than {TOLERANCE:.0e}")


def _run(stage: Stage) -> Demo:
    load_modules(stage, "dsmoe_compiler.api")
    import torch

    from dsmoe_compiler import api
    from dsmoe_compiler.cli.model_argument import resolve

    stage(f"build {MODEL}")
    call = resolve(MODEL, (), with_weights=True)
    start = time.perf_counter()
    program = api.compile(call.model, call.args, call.kwargs, progress=stage)
    compile_seconds = time.perf_counter() - start
    comparisons = []
    for tokens in TOKENS:
        stage(f"measure T = {tokens}")
        comparisons.append(_compare(call.model, program, tokens))
    return Demo(program.report, compile_seconds, torch.get_num_threads(), tuple(comparisons))


def _compare(model: Callable[..., Any], program: Callable[..., Any], tokens: int) -> Comparison:
    """Both on one random sequence. Outside an export the model loops over the experts that tokens hit."""
    import torch

    from dsmoe_compiler.models.zoo import preset

    vocabulary = preset(MODEL).config.vocab_size
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        wanted, got = model(input_ids=ids), program(input_ids=ids)
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        rounds = interleaved(
            {"eager": lambda i: model(input_ids=ids), "compiled": lambda i: program(input_ids=ids)},
            MOST_ROUNDS,
            budget_seconds=BUDGET_SECONDS,
        )
    eager_ms, compiled_ms = 1e3 * rounds.median("eager"), 1e3 * rounds.median("compiled")
    return Comparison(tokens, eager_ms, compiled_ms, rounds.ratio("eager", "compiled"), rounds.kept, error)


def _print_json(result: Demo) -> None:
    record = {
        "model": MODEL,
        "compile_seconds": result.compile_seconds,
        "error": result.error,
        "threads": result.threads,
        "comparisons": [asdict(each) for each in result.comparisons],
        "report": json.loads(result.report.to_json()),
    }
    click.echo(json.dumps(record, indent=2))


def _print(result: Demo) -> None:
    from dsmoe_compiler.cli.paint import console, print_grid, print_lines, print_report

    to = console()
    print_report(to, result.report)
    to.print()
    to.print(f"captured and compiled in {result.compile_seconds:.1f} s")
    to.print(f"against eager on {len(TOKENS)} other inputs: largest relative error {result.error:.1e}")
    to.print()
    print_grid(to, _timings(result))
    print_lines(
        to,
        (
            f"T tokens in one sequence, {result.threads} threads; eager loops over the experts chosen.",
            "Medians of the calmer half of the rounds; both take turns, after a warm-up.",
        ),
        style="dim",
    )
    to.print()
    to.print("try next:")
    print_lines(to, (f"  {line}" for line in _next_steps(_command())))


def _timings(result: Demo) -> Grid:
    titles = ("T", "eager ms", "compiled ms", "faster", "max error", "rounds")
    rows = (
        Row(
            (
                str(each.tokens),
                f"{each.eager_ms:.1f}",
                f"{each.compiled_ms:.1f}",
                f"{each.ratio:.2f} ×",
                f"{each.error:.1e}",
                str(each.rounds),
            ),
            alert=each.ratio < 1,
        )
        for each in result.comparisons
    )
    return Grid(tuple(Column(title, number=True) for title in titles), tuple(rows))


def _next_steps(command: str) -> tuple[str, ...]:
    return (
        "a 16B model, in seconds, without its weights:",
        f"  {command} inspect deepseek-moe-16b",
        "a program in a file, to load in Python:",
        f"  {command} compile deepseek-moe-tiny -o tiny.pt2",
        "your own model:",
        f"  {command} inspect your_package.your_module:build",
    )


def _command() -> str:
    """How this program can be called again from where it was called."""
    return "dsmoe" if shutil.which("dsmoe") else os.path.relpath(sys.argv[0])
