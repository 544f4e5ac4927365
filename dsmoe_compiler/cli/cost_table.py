"""A model's cost on a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from dsmoe_compiler.cli.paint import console, print_grid, print_lines, reading_width
from dsmoe_compiler.cost_model.cost import Cost
from dsmoe_compiler.cost_model.parts import Part
from dsmoe_compiler.cost_model.step import Step
from dsmoe_compiler.report.grid import Column, Grid, Row
from dsmoe_compiler.report.layer_names import collapse
from dsmoe_compiler.report.story import WHOLE_MODEL

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LEGEND = (
    "experts: parameters of one layer's routed ones. FLOPs are those of matrix products, a multiply-add "
    "being two; attention counts every query with every key. weights: bytes of the model's tensors that a "
    "step is expected to read under uniform routing, each once. floor: no less by the data sheet, whichever "
    "of products and weights takes longer; a token alone attends to no cache."
)
_KINDS = {"activations": "attention (activations by activations)", "weights": "other weights"}


def print_cost(cost: Cost) -> None:
    """Headline, parts, steps, remarks."""
    to = console()
    width = reading_width(to)
    for number, line in enumerate(_headline(cost)):
        print_lines(to, textwrap.wrap(line, width), style="" if number else "bold")
    if cost.parts:
        to.print()
        print_grid(to, parts_grid(cost))
    if cost.kinds:
        kinds = ", ".join(
            f"{_KINDS.get(kind, kind)} {_share(flops, cost.flops)}" for kind, flops in cost.kinds
        )
        print_lines(to, textwrap.wrap(f"of all FLOPs: {kinds}", width), style="dim")
    to.print()
    print_lines(to, [f"a step on {cost.gpu}"], style="bold cyan")
    print_grid(to, steps_grid(cost.steps))
    to.print()
    for remark in cost.remarks:
        print_lines(to, textwrap.wrap(remark, width, subsequent_indent="    "), style="yellow")
    print_lines(to, textwrap.wrap(LEGEND, width), style="dim")


def _headline(cost: Cost) -> Iterator[str]:
    parameters = cost.parameters
    activated = f"{amount(parameters.activated, billion='B')} activated by a token"
    held = f"{cost.model}: {amount(parameters.total, billion='B')} parameters"
    yield f"{held}, {activated} ({_share(parameters.activated, parameters.total)})"
    sequences = "1 sequence" if cost.batch == 1 else f"{cost.batch} sequences"
    dtypes = f", {' and '.join(cost.dtypes)}" if cost.dtypes else ""
    tokens = "1 token" if cost.seq == 1 else f"{cost.seq} tokens"
    least = "" if all(part.complete for part in cost.parts) else "≥ "
    yield f"forward of {sequences} of {tokens}{dtypes}: {least}{amount(cost.flops, 'FLOP')}"
    training = f"{least}{amount(cost.training_flops, 'FLOP')}"
    yield f"training of 1 sequence, as the DeepSeekMoE paper counts: {training}"


def parts_grid(cost: Cost) -> Grid:
    """A line for the parts that are alike; of an MoE layer what it is."""
    columns = (
        Column("part"),
        *(Column(title, number=True) for title in ("E", "K", "S", "experts", "FLOP", "share")),
    )
    return Grid(columns, tuple(Row(_part_cells(part, cost), alert=part.refused) for part in cost.parts))


def _part_cells(part: Part, cost: Cost) -> tuple[str, ...]:
    mixture = part.mixture
    what = ("", "", "", "")
    if mixture is not None:
        shared = f"{mixture.shared_width} wide" if mixture.shared is None else str(mixture.shared)
        what = (str(mixture.experts), str(mixture.top_k), shared, amount(mixture.parameters, billion="B"))
    least = "" if part.complete else "≥ "
    many = f"{len(part.names)} × " if len(part.names) > 1 else ""
    flops = least + many + amount(part.flops)
    return (collapse(part.names) or WHOLE_MODEL, *what, flops, least + _share(part.total, cost.flops))


def steps_grid(steps: Sequence[Step]) -> Grid:
    """A line for each step."""
    titles = ("tokens", "experts hit", "weights", "a token", "FLOP", "FLOP/byte", "floor")
    columns = (*(Column(title, number=True) for title in titles), Column("bound"))
    return Grid(columns, tuple(Row(_step_cells(step)) for step in steps))


def _step_cells(step: Step) -> tuple[str, ...]:
    return (
        str(step.tokens),
        ", ".join(f"{hit.expected:.1f} of {hit.experts}" for hit in step.hit) or "-",
        amount(step.weight_bytes, "B"),
        amount(step.bytes_per_token, "B"),
        amount(step.flops),
        "-" if step.intensity is None else f"{step.intensity:.1f}",
        duration(step.seconds),
        step.bound,
    )


def amount(number: float, unit: str = "", billion: str = "G") -> str:
    """Four digits, a prefix and the unit: "25.30 TFLOP", "912 B"; `billion` is what 10⁹ is called."""
    for factor, prefix in _PREFIXES:
        if _rounded(number) >= factor:
            return f"{_digits(number / factor)} {billion if prefix == 'G' else prefix}{unit}"
    return f"{_digits(number)} {unit}".rstrip()


def duration(seconds: float) -> str:
    """ "2.182 ms"."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if _rounded(seconds) >= factor:
            return f"{_digits(seconds / factor)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def _digits(number: float) -> str:
    """Four significant ones, no more."""
    if number == int(number) and number < 10_000:
        return str(int(number))
    rounded = _rounded(number)
    return f"{rounded:.{max(0, 4 - len(str(int(rounded))))}f}"


def _rounded(number: float) -> float:
    """To four significant digits, so that 999.96 is told as 1000 is."""
    return float(f"{number:.4g}")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
