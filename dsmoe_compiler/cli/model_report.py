"""The report of a MODEL argument: a model is captured and read, of a saved program its own is taken."""

from __future__ import annotations

from pathlib import Path

import click

from dsmoe_compiler.cli.input_option import ExampleInput
from dsmoe_compiler.cli.model_argument import is_saved_program, resolve
from dsmoe_compiler.cli.stages import Stage, load_modules
from dsmoe_compiler.report.report import Report


def model_report(text: str, inputs: tuple[ExampleInput, ...], stage: Stage) -> tuple[Report, tuple[str, ...]]:
    """(the report, what the user should be told of how the model was built)."""
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
