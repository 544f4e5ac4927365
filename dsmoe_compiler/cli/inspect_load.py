"""`dsmoe inspect --load`: the load of each layer's experts as a heat map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from itertools import groupby
from operator import add
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from dsmoe_compiler.cli.input_option import ExampleInput
from dsmoe_compiler.cli.model_report import model_report
from dsmoe_compiler.cli.paint import console, print_lines, print_report, reading_width
from dsmoe_compiler.cli.stages import stages
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.grid import GAP
from dsmoe_compiler.report.load import LayerLoad, Load
from dsmoe_compiler.report.load_map import ASCII, RAMP
from dsmoe_compiler.report.load_text import tell
from dsmoe_compiler.report.report import LayerReport, Report
from dsmoe_compiler.report.story import WHOLE_MODEL

# From none over an even share, in grey, to twice that; told apart also by who sees no red or no green.
_COLOURS = ("dim", *(f"color({n})" for n in (25, 31, 67, 250, 222, 214, 208, 196)))


def inspect_load(
    files: Sequence[Path], model: str | None, inputs: tuple[ExampleInput, ...], as_json: bool
) -> None:
    """Print the sum of the loads, below MODEL's report if there is one.

    Raises InputError when a file is no load, or the loads and the model do not belong together.
    """
    load = _read(files)
    report, notes = None, tuple[str, ...]()
    if model is not None:
        with stages() as stage:
            report, notes = model_report(model, inputs, stage)
        require_fit(load, report, model)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        record = {"report": json.loads(report.to_json())} if report else {}
        click.echo(json.dumps({**record, "load": _record(load)}, indent=2))
        return
    to = console()
    if report:
        print_report(to, report)
        to.print()
    print_load(to, load)


def print_load(to: Console, load: Load) -> None:
    """The heat map, its figures, and what they mean; the map in colour on a terminal."""
    story, shown = tell(load, reading_width(to)), _shown(to.encoding)
    painted = to.is_terminal
    print_lines(to, story.headline, style="bold" if painted else "")
    if story.grid:
        to.print()
        to.print(Text(GAP.join(story.grid.titles).rstrip(), style="bold underline" if painted else ""))
        for row in story.grid.rows:
            label, cells, *figures = story.grid.padded(row)
            line = Text(label + GAP, style="cyan" if painted else "")
            for cell, alike in groupby(cells):
                colour = _COLOURS[RAMP.index(cell)] if cell in RAMP else ""
                line.append("".join(alike).translate(shown), style=colour)
            to.print(line.append(GAP + GAP.join(figures), style=""))
    if story.legend:
        to.print()
        print_lines(to, (line.translate(shown) for line in story.legend), style="dim" if painted else "")


def _shown(encoding: str) -> dict[int, int]:
    """What stands for characters that the terminal, or the file, has no code for."""
    try:
        RAMP.encode(encoding)
    except UnicodeEncodeError:
        return str.maketrans(f"{RAMP}−", f"{ASCII}-")
    return {}


def require_fit(load: Load, report: Report, model: str) -> None:
    """Raise InputError unless the load is one of this model's layers."""
    layers = {layer.name: layer for layer in report.layers}
    for counted in load.layers:
        name = counted.name or WHOLE_MODEL
        if counted.name not in layers:
            raise InputError(f"the load is not of {model}: that has no MoE layer {name}")
        if differs := _differs(counted, layers[counted.name]):
            raise InputError(f"the load is not of {model}: {name} {differs}")
    missing = [layer.name or WHOLE_MODEL for layer in report.layers if layer.name not in _names(load)]
    if missing:
        raise InputError(f"the load is not of {model}: it has no layer {missing[0]}")


def _differs(counted: LayerLoad, layer: LayerReport) -> str:
    """What tells a layer from the one that was counted; "" where nothing does, or nothing is known of it."""
    if layer.spec is None:
        return ""
    loaded, found = len(counted.counts), layer.spec.experts.count
    if loaded != found:
        return f"has {found} experts there, {loaded} in the load"
    return (
        ""
        if counted.top_k == layer.spec.top_k
        else f"is top-{layer.spec.top_k} there, top-{counted.top_k} in the load"
    )


def _names(load: Load) -> set[str]:
    return {*(layer.name for layer in load.layers), *load.not_counted}


def _read(files: Sequence[Path]) -> Load:
    """The files' loads added up."""
    loads = [Load.read(file) for file in files]
    try:
        return reduce(add, loads)
    except InputError as e:
        raise InputError(f"{', '.join(map(str, files))}: {e}") from e


def _record(load: Load) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name,
            "experts": len(layer.counts),
            "top_k": layer.top_k,
            "tokens": layer.tokens,
            "dropped": layer.dropped,
            "max_violation": layer.max_violation,
            "entropy_bits": layer.entropy,
            "even_entropy_bits": layer.even_entropy,
            "unused": layer.unused,
            "counts": layer.counts,
        }
        for layer in load.layers
    ]
    return {"model": load.model, "layers": layers, "not_counted": load.not_counted}
