"""The commands, in one place."""

from __future__ import annotations

import click

from dsmoe_compiler.cli.bench import bench
from dsmoe_compiler.cli.compile import compile_model
from dsmoe_compiler.cli.cost import cost
from dsmoe_compiler.cli.demo import demo
from dsmoe_compiler.cli.diff import diff
from dsmoe_compiler.cli.exit_status import OneLineErrors
from dsmoe_compiler.cli.explain import explain
from dsmoe_compiler.cli.export import export
from dsmoe_compiler.cli.inspect import inspect_model
from dsmoe_compiler.cli.kernels import kernels
from dsmoe_compiler.cli.models import models
from dsmoe_compiler.cli.opt import opt


@click.group(
    "dsmoe",
    cls=OneLineErrors,
    commands=[inspect_model, explain, compile_model, export, opt, diff, kernels, cost, bench, models, demo],
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="dsmoe-compiler", prog_name="dsmoe", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A compiler for Mixture-of-Experts models.

    It captures a PyTorch model, understands each MoE layer however it was written, and replaces it with one
    op.

    \b
    MODEL is one of
      deepseek-moe-16b         a name of the zoo; `dsmoe models` lists them
      package.module:callable  yours (the current folder is importable): the model, or, if it takes no
                               arguments, a factory of a module or of (model, args, kwargs)
      hf:PATH                  a folder with a config.json, and weights if it has them
      FILE.pt2                 a program that `dsmoe compile` wrote

    \b
    Exit status: 0 done (also without MoE layers), 1 a layer was refused and --require-fused asked, or an
    answer was wrong in a benchmark, 2 the input is wrong, 70 an internal error, 130 interrupted.

    \b
    Examples:
      dsmoe demo
      dsmoe inspect deepseek-moe-16b
      dsmoe compile deepseek-moe-tiny -o tiny.pt2
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
