"""What a saved program costs: its file against the model's weights, and the seconds to save and to load it.

    python -m benchmarks.save_size [--quick] [--json PATH]

Each file is loaded in a process of its own, and its output compared bit by bit with that before saving.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dsmoe_compiler
from benchmarks.measure import Target, finish, in_fresh_process, wide_console
from benchmarks.one_load import Loaded
from dsmoe_compiler.models import zoo

MODELS = ("deepseek-moe-tiny", "deepseek-moe-demo")
SIZE_RATIO = 1.02


@dataclass(frozen=True)
class Saved:
    """One model: bytes of its weights and of the file, and wall seconds of every save and load.

    `identical` says whether all loaded programs computed the very same.
    """

    model: str
    weights: int
    file: int
    save_seconds: tuple[float, ...]
    load_seconds: tuple[float, ...]
    identical: bool

    @property
    def ratio(self) -> float:
        """The file's size over the weights'."""
        return self.file / self.weights


def saved(name: str, rounds: int) -> Saved:
    """Save the compiled model and load it elsewhere, `rounds` times."""
    model, example = zoo.build(name), zoo.example_inputs(name)
    program = dsmoe_compiler.compile(model, (), example, require_fused=True)
    saves, loads = list[float](), list[Loaded]()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, call = Path(folder) / "program.pt2", Path(folder) / "call.pt"
        torch.save({**example, "output": program(**example)}, call)
        for _ in range(rounds):
            start = time.perf_counter()
            program.save(path)
            saves.append(time.perf_counter() - start)
            loads.append(Loaded(**in_fresh_process("benchmarks.one_load", str(path), str(call))))
        size = path.stat().st_size
    identical = all(each.identical for each in loads)
    return Saved(
        name, weights_size(model), size, tuple(saves), tuple(each.seconds for each in loads), identical
    )


def weights_size(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def targets(cases: Sequence[Saved]) -> list[Target]:
    """The file is barely more than the weights, and the program the same."""
    return [
        target
        for c in cases
        for target in (
            Target(f"{c.model}: file / weights", c.ratio, SIZE_RATIO),
            Target(f"{c.model}: loaded elsewhere, same bits (1: yes)", c.identical, 1, at_least=True),
        )
    ]


def print_cases(console: Console, cases: Sequence[Saved]) -> None:
    """One row a model; median seconds."""
    table = Table("model", title="a saved program", title_justify="left")
    for column in ("weights MB", "file MB", "ratio", "save s", "load s", "identical output"):
        table.add_column(column, justify="right")
    for c in cases:
        megabytes = [f"{size / 1e6:.3f}" for size in (c.weights, c.file)]
        seconds = [f"{statistics.median(s):.2f}" for s in (c.save_seconds, c.load_seconds)]
        table.add_row(c.model, *megabytes, f"{c.ratio:.4f}", *seconds, "yes" if c.identical else "no")
    console.print(table)


@click.command(help="What a saved program costs.")
@click.option("--quick", is_flag=True, help="One round.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(quick: bool, path: Path | None) -> None:
    console, cases = wide_console(), list[Saved]()
    for name in MODELS:
        with console.status(name):
            cases.append(saved(name, 1 if quick else 5))
    print_cases(console, cases)
    results = {"cases": [{**asdict(c), "ratio": c.ratio} for c in cases]}
    raise SystemExit(finish(console, "save_size", results, targets(cases), path))


if __name__ == "__main__":
    main()
