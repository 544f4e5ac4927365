"""What checking costs of a compile: every rewrite on its layer's weights, then the program against the model.

    python -m benchmarks.validation_cost [--quick] [--json PATH]

Tiny models, where a check has the least to hide behind: `compile` with verification, as it is by default, and
without, taking turns in one process; CPU seconds, one thread. The whole program's check is a pass of the
report, so its share is of the same run's wall time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Literal, TypeAlias

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dsmoe_compiler
from benchmarks.compile_cost import deepseek
from benchmarks.measure import Target, finish, interleaved, wide_console
from benchmarks.module_lists import SPELLINGS

SHARE = 0.3


@dataclass(frozen=True)
class ValidationCost:
    """One model: CPU seconds with verification and without, and the whole program's check's share of wall
    time.
    """

    model: str
    capture: str
    checked: float
    unchecked: float
    whole_program: float

    @property
    def share(self) -> float:
        """Of the CPU seconds of a compile with verification, what verification takes."""
        return max(0.0, 1 - self.unchecked / self.checked)


Capture: TypeAlias = Literal["auto", "as_written"]


def models() -> Iterator[tuple[str, Capture, nn.Module, Tensor]]:
    """(name, how it is captured, model, its input)."""
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    yield "DeepSeekMoE, 2 layers", "auto", deepseek(2, 8), ids
    for name, build in SPELLINGS.items():
        yield f"module list: {name}", "as_written", build(32, 48, 8).eval(), torch.randn(10, 32)
    if find_spec("transformers"):
        from tests.transformers_models import FAMILIES, family

        for name in FAMILIES:
            yield name, "auto", family(name), ids


def measure(name: str, capture: Capture, model: nn.Module, x: Tensor, rounds: int) -> ValidationCost:
    """Compile with and without verification, taking turns."""
    whole: list[float] = []

    def compiled(verify: Literal["numeric", "off"]) -> Callable[[int], None]:
        def once(_: int) -> None:
            program = dsmoe_compiler.compile(model, (x,), capture=capture, verify=verify)
            seconds = {p.name: p.seconds for p in program.report.passes}
            if "check" in seconds:
                whole.append(seconds["check"] / sum(seconds.values()))

        return once

    calls = {"checked": compiled("numeric"), "unchecked": compiled("off")}
    found = interleaved(calls, rounds, process_time)
    medians = {name: found.median(name) for name in calls}
    return ValidationCost(name, capture, **medians, whole_program=statistics.median(whole))


def print_costs(console: Console, costs: list[ValidationCost]) -> None:
    """One row a model."""
    table = Table("model", "capture", title="compile, with and without verification", title_justify="left")
    for column in ("CPU s", "without", "verification", "whole program"):
        table.add_column(column, justify="right")
    for c in costs:
        cells = (f"{c.checked:.2f}", f"{c.unchecked:.2f}", f"{c.share:.0%}", f"{c.whole_program:.0%}")
        table.add_row(c.model, c.capture, *cells)
    console.print(table)


@click.command(help="What checking costs of a compile.")
@click.option("--quick", is_flag=True, help="One round of everything.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(quick: bool, path: Path | None) -> None:
    torch.set_num_threads(1)
    console = wide_console()
    costs = []
    for name, capture, model, x in models():
        with console.status(name):
            costs.append(measure(name, capture, model, x, 1 if quick else 6))
    print_costs(console, costs)
    targets = [
        target
        for c in costs
        for target in (
            Target(f"{c.model}: the whole program's check", c.whole_program, SHARE),
            Target(f"{c.model}: all verification", c.share, SHARE),
        )
    ]
    results = {"costs": [asdict(c) | {"share": c.share} for c in costs]}
    raise SystemExit(finish(console, "validation_cost", results, targets, path))


if __name__ == "__main__":
    main()
