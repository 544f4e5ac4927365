"""What `dsmoe bench` measured, as a table and as data."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import click

from dsmoe_compiler.cli.memory import readable
from dsmoe_compiler.report.grid import Column, Grid, Row
from dsmoe_compiler.report.report import Report

EAGER, TORCH_COMPILE, OURS = "eager", "torch.compile", "dsmoe"
# In the table "compile" stands for torch.compile: eight columns have to fit into eighty characters.
_TITLES = {EAGER: "eager", TORCH_COMPILE: "compile", OURS: "dsmoe"}


@dataclass(frozen=True)
class Measurement:
    """The candidates on one number of tokens; `label` is what the table calls it, `tokens` T, if it is known.

    By candidate: `milliseconds`, medians of the rounds kept; `times_faster`, how many times faster dsmoe is,
    the median of the rounds' own ratios; `errors`, relative, against eager; `wrong`, in words. What is wrong
    or could not be compiled is not measured.
    """

    label: str
    shape: tuple[int, ...]
    tokens: int | None
    milliseconds: Mapping[str, float]
    times_faster: Mapping[str, float]
    errors: Mapping[str, float]
    wrong: Mapping[str, str]
    rounds: int
    discarded: int

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all sequences that dsmoe runs through the model in a second."""
        if self.tokens is None or OURS not in self.milliseconds:
            return None
        return self.shape[0] * self.tokens / (self.milliseconds[OURS] / 1e3)


@dataclass(frozen=True)
class Benchmark:
    """Everything the command found. Seconds of torch.compile are of all its compiles; None where there were
    none. `experts` is how transformers runs the eager model's experts, where it does.
    """

    model: str
    dtype: str
    weight_bytes: int
    threads: int
    experts: str | None
    report: Report
    compile_seconds: float
    torch_compile_seconds: float | None
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def has_torch_compile(self) -> bool:
        """Whether torch.compile gave an answer to anything, right or wrong."""
        return any(TORCH_COMPILE in each.errors for each in self.measurements)

    @property
    def wrong(self) -> tuple[str, ...]:
        """Which answers were not eager's, a line each."""
        return tuple(
            f"{name} is wrong at {_where(each)}: {why}"
            for each in self.measurements
            for name, why in each.wrong.items()
        )

    def to_json(self) -> str:
        """One record."""
        record: dict[str, Any] = asdict(self)
        record["report"] = json.loads(self.report.to_json())
        for each, measurement in zip(record["measurements"], self.measurements, strict=True):
            each["tokens_per_second"] = measurement.tokens_per_second
            each["errors"] = {name: _finite(error) for name, error in each["errors"].items()}
        return json.dumps(record, indent=2)


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if error < float("inf") else None


def _where(measurement: Measurement) -> str:
    return f"T={measurement.label}" if measurement.tokens is not None else f"inputs of {measurement.label}"


def print_benchmark(found: Benchmark, as_json: bool) -> None:
    """To stdout."""
    if as_json:
        click.echo(found.to_json())
        return
    from dsmoe_compiler.cli.paint import console, print_grid, print_lines, reading_width
    from dsmoe_compiler.report.story import tell

    to = console()
    width = reading_width(to)
    good = found.report.fused == len(found.report.layers)
    painted = ("bold green" if good else "bold yellow") if to.is_terminal else ""
    print_lines(to, tell(found.report, width).headline, style=painted)
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    weights = f"{readable(found.weight_bytes)} of weights, {found.dtype}; " if found.dtype else ""
    print_lines(to, [f"{weights}{threads}"])
    to.print()
    print_grid(to, benchmark_grid(found))
    to.print()
    for line in _legend(found):
        print_lines(to, textwrap.wrap(line, width, subsequent_indent="  "), style="dim")


def benchmark_grid(found: Benchmark) -> Grid:
    """A row a number of tokens: medians in ms, how many times faster dsmoe is, its tokens/s and error."""
    shown = [
        name for name in (EAGER, TORCH_COMPILE, OURS) if name != TORCH_COMPILE or found.has_torch_compile
    ]
    titles = [
        "T" if all(each.tokens is not None for each in found.measurements) else "inputs",
        *(f"{_TITLES[name]} ms" for name in shown),
        *(f"vs {_TITLES[name]}" for name in shown if name != OURS),
        "tokens/s",
        "error",
    ]
    rows = [_row(each, shown) for each in found.measurements]
    return Grid(tuple(Column(title, number=True) for title in titles), tuple(rows))


def _row(each: Measurement, shown: list[str]) -> Row:
    error = each.errors.get(OURS)
    rate = each.tokens_per_second
    cells = (
        each.label,
        *(_milliseconds(each, name) for name in shown),
        *(_times(each.times_faster.get(name)) for name in shown if name != OURS),
        "–" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
        "–" if error is None else f"{error:.0e}",
    )
    slower = any(ratio < 1 for ratio in each.times_faster.values())
    return Row(cells, alert=slower or bool(each.wrong))


def _milliseconds(each: Measurement, name: str) -> str:
    if name in each.wrong:
        return "wrong"
    found = each.milliseconds.get(name)
    if found is None:
        return "–"
    return f"{found:.0f}" if found >= 1000 else f"{found:.1f}" if found >= 10 else f"{found:.2f}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} ×"


def _legend(found: Benchmark) -> list[str]:
    how = f", its experts run by transformers' {found.experts}" if found.experts else ""
    lines = [f"eager: the model as it is{how}."]
    if found.has_torch_compile:
        lines.append(
            "compile: torch.compile(model), compiled for each T by itself; "
            f"{found.torch_compile_seconds:.0f} s in all. dsmoe.compile took {found.compile_seconds:.0f} s."
        )
    if found.report.fused < len(found.report.layers):
        lines.append(f"`dsmoe explain {found.model}` says why layers are not fused.")
    kept = {each.rounds for each in found.measurements}
    rounds = f"{min(kept)} to {max(kept)}" if len(kept) > 1 else f"{min(kept, default=0)}"
    lines.append(
        f"Forwards without a cache. ms: medians of the calmer half of the rounds ({rounds}); vs: how many "
        "times faster dsmoe is, the median of the rounds' own ratios; error: dsmoe's answers against eager's."
    )
    return lines
