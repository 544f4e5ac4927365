"""A comparison of two graphs on a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from dsmoe_compiler.cli.diff_cells import printable, shortened
from dsmoe_compiler.cli.diff_grids import (
    layers_grid,
    operators_grid,
    properties_grid,
    sizes_grid,
    values_grid,
)
from dsmoe_compiler.cli.diff_tensors import tensors_grid
from dsmoe_compiler.cli.memory import readable
from dsmoe_compiler.cli.paint import console, print_grid, print_lines, reading_width
from dsmoe_compiler.graph_diff.compare import GraphDiff
from dsmoe_compiler.graph_diff.tensor_changes import TOO_MANY
from dsmoe_compiler.report.grid import GAP
from dsmoe_compiler.report.story import INDENT

_GRIDS = (sizes_grid, operators_grid, layers_grid, tensors_grid, values_grid, properties_grid)


def print_diff(diff: GraphDiff) -> None:
    """Sides, verdict, and a table for each part that differs."""
    to = console()
    width = reading_width(to)
    print_lines(to, _sides(diff), style="bold")
    print_lines(to, textwrap.wrap(_verdict(diff), width), style="bold green" if diff.same else "bold yellow")
    for grid in (make(diff, width) for make in _GRIDS):
        if grid.rows:
            to.print()
            print_grid(to, grid)
    remarks = list(_remarks(diff, width))
    if remarks:
        to.print()
    for remark in remarks:
        print_lines(to, textwrap.wrap(remark, width, subsequent_indent=INDENT), style="dim")


def _sides(diff: GraphDiff) -> Iterator[str]:
    for letter, facts in (("A", diff.a), ("B", diff.b)):
        yield f"{letter}: {printable(facts.source)} ({facts.form})"


def _verdict(diff: GraphDiff) -> str:
    if not diff.same:
        return f"they differ in {_listed(_differing(diff))}"
    compared = ["operators", "wiring", "properties"] if diff.operators is not None else []
    compared += ["MoE layers"] if diff.layers is not None else []
    tensors = "tensors' names and types" if diff.tensors.unread else "tensors"
    return f"they are the same in {_listed([*compared, tensors, 'inputs', 'outputs'])}"


def _differing(diff: GraphDiff) -> list[str]:
    tensors = diff.tensors
    parts: dict[str, object] = {
        "operators": diff.operators,
        "wiring": diff.rewired,
        "MoE layers": diff.layers,
        "tensors": any(tensors.differences.values()),
        "inputs": diff.inputs,
        "outputs": diff.outputs,
        "properties": diff.properties,
    }
    return [name for name, changes in parts.items() if changes]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _remarks(diff: GraphDiff, width: int) -> Iterator[str]:
    if diff.rewired is not None:
        room = width - len(INDENT) - 3
        yield (
            "the operators are the same, but their order, operands or attributes are not: "
            f"line {diff.rewired.line} of the graph's text is the first that differs"
        )
        yield f"{INDENT}A{GAP}{shortened(printable(diff.rewired.before), room)}"
        yield f"{INDENT}B{GAP}{shortened(printable(diff.rewired.after), room)}"
    for unread in diff.tensors.unread:
        many = "1 tensor" if unread.count == 1 else f"{unread.count} tensors"
        what_to_do = "; --contents compares them" if unread.why == TOO_MANY else ""
        yield f"the numbers of {many} ({readable(unread.bytes)}) were not compared: {unread.why}{what_to_do}"
    yield from map(printable, diff.left_out)
    if diff.same and diff.a.form == diff.b.form and diff.a.size.graph_bytes != diff.b.size.graph_bytes:
        yield "the files differ in what the graph does not mean: names of values, comments, places of data"
