"""Memory of compiling a model whose experts are separate modules, and the CPU seconds of inspecting one.

    python -m benchmarks.memory [--quick] [--json PATH]

The experts' tensors have to become one tensor with the experts first, without a second copy. Measured in a
process of its own: resident memory after capture alone, the peak of a whole compile (capture, passes, every
check), and what remains. Peak and remainder are given above the first, as a share of the weights: 1 would be
a second copy. Linux only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

import dsmoe_compiler
from benchmarks.measure import Target, finish, in_fresh_process, wide_console
from benchmarks.module_lists import SPELLINGS, Network
from benchmarks.one_pack import Packed

LAYERS, WIDTH, HIDDEN, EXPERTS = 8, 1024, 704, 16  # 1.1 GB of fp32
PEAK, AFTER = 0.15, 0.05
INSPECTED = (4, 32, 48, 64)  # layers, width, hidden, experts
INSPECT_SECONDS = 120.0


def above(case: Packed, resident: int) -> float:
    """Memory above that after capture, over the weights."""
    return (resident - case.captured) / case.weights


def inspection_seconds(spelling: str) -> float:
    """CPU seconds of `inspect` on four layers of 64 experts."""
    model, x = Network(SPELLINGS[spelling], *INSPECTED), torch.randn(10, INSPECTED[1])
    start = time.process_time()
    report = dsmoe_compiler.inspect(model, (x,))
    assert report.fused == INSPECTED[0]
    return time.process_time() - start


def targets(cases: dict[str, Packed], seconds: dict[str, float]) -> list[Target]:
    """No second copy at any time, and an inspection that one waits for."""
    found = list[Target]()
    for name, case in cases.items():
        found.append(Target(f"{name}: peak above capture / weights", above(case, case.peak), PEAK))
        found.append(Target(f"{name}: remaining above capture / weights", above(case, case.after), AFTER))
    return found + [Target(f"{name}: inspect, CPU s", s, INSPECT_SECONDS) for name, s in seconds.items()]


def print_cases(console: Console, cases: dict[str, Packed], seconds: dict[str, float]) -> None:
    """One row a spelling; megabytes."""
    title = f"{LAYERS} layers of {EXPERTS} separate experts; inspection of {INSPECTED[0]} of {INSPECTED[3]}"
    table = Table("spelling", title=title, title_justify="left")
    for column in ("weights MB", "captured MB", "peak MB", "after MB", "peak above", "inspect CPU s"):
        table.add_column(column, justify="right")
    for name, c in cases.items():
        megabytes = [f"{size / 1e6:.0f}" for size in (c.weights, c.captured, c.peak, c.after)]
        table.add_row(name, *megabytes, f"{above(c, c.peak):.3f}", f"{seconds[name]:.1f}")
    console.print(table)


def _spellings(quick: bool) -> Sequence[str]:
    return list(SPELLINGS)[: 1 if quick else None]


@click.command(help="Memory of compiling a model of separate experts.")
@click.option("--quick", is_flag=True, help="One spelling.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(quick: bool, path: Path | None) -> None:
    console, cases, seconds = wide_console(), dict[str, Packed](), dict[str, float]()
    sizes = [str(size) for size in (LAYERS, WIDTH, HIDDEN, EXPERTS)]
    for name in _spellings(quick):
        with console.status(name):
            cases[name] = Packed(**in_fresh_process("benchmarks.one_pack", name, *sizes))
            seconds[name] = inspection_seconds(name)
    print_cases(console, cases, seconds)
    results = {
        "cases": {name: asdict(case) for name, case in cases.items()},
        "inspect_cpu_seconds": seconds,
    }
    raise SystemExit(finish(console, "memory", results, targets(cases, seconds), path))


if __name__ == "__main__":
    main()
