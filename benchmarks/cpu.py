"""The compiled MoE layer on a CPU against its floor, and against every other way to run the same layer.

    python -m benchmarks.cpu [--quick] [--shapes D1024,D2048] [--dtypes bf16,fp32] [--tokens 1,4,…]
                             [--minutes 8] [--json PATH]

Transformers' eager, batched_mm and grouped_mm experts, each also under torch.compile; onnxruntime, where it
is installed, by its own operator and by standard ones. Several layers take turns, so that no figure tells of
weights that a cache happened to hold; every answer is compared with eager's first, and what is hopeless once
warmed up is left out and named. The floor's rates are measured in the same rounds (cpu_floor.py).

A run of everything writes results/cpu.json, after every layer, and draws results/cpu.svg; any other writes
where --json says. `--tiny` walks the same code on layers whose times mean nothing.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import click
import torch
from rich.console import Console

from benchmarks.cpu_case import Case, Subject, measure
from benchmarks.cpu_floor import probes
from benchmarks.cpu_report import drawing, print_cases, targets
from benchmarks.cpu_shapes import SHAPES, TINY, Shape, build
from benchmarks.cpu_ways import MOE, SPLIT, onnxruntime_ways, ours, transformers_ways
from benchmarks.measure import ROOT, finish, wide_console

TOKENS = (1, 4, 16, 64, 128, 512, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
Choice = TypeVar("Choice")


def subject(shape: Shape, dtype: torch.dtype) -> Subject:
    """The layers, compiled, and all other ways to run them; torch.compile itself works at the first call."""
    torch.compiler.reset()  # its graphs of the layers before are of no use, and there may be so many only
    layers = build(shape, dtype)
    ways = [*ours(layers, shape), *transformers_ways(layers, shape)]
    theirs = onnxruntime_ways(layers, shape, dtype)
    absent = {MOE: theirs, SPLIT: theirs} if isinstance(theirs, str) else {}
    return Subject(
        shape, dtype, layers, [*ways, *(theirs if not absent else [])], probes(layers, dtype), absent
    )


def run_layer(
    console: Console, shape: Shape, dtype: torch.dtype, tokens: Sequence[int], share: float, end: float
) -> tuple[list[Case], list[str]]:
    """The layer at every T, each with its part of the time until `share`; and what no time was left for, once
    that and a quarter of what follows until `end` have passed. Both by the monotonic clock.
    """
    cases, skipped = list[Case](), list[str]()
    what = f"{shape.name}, {str(dtype).removeprefix('torch.')}"
    if end < time.monotonic():
        return [], [what]
    with console.status(f"{what}: layers and sessions"):
        current = subject(shape, dtype)
    for done, count in enumerate(tokens):
        if share + (end - share) / 4 < time.monotonic():
            skipped.append(f"{what}, T={count}")
            continue
        left = max(share - time.monotonic(), 0)
        with console.status(f"{what}, T={count}"):
            cases.append(measure(current, count, left / (len(tokens) - done)))
    return cases, skipped


@click.command(help="The compiled MoE layer on a CPU against its floor and every other way.")
@click.option("--shapes", help=f"Layers, with commas: {','.join(SHAPES)}.")
@click.option("--dtypes", help=f"With commas: {','.join(DTYPES)}.")
@click.option("--tokens", help=f"Numbers of tokens, with commas: {','.join(map(str, TOKENS))}.")
@click.option("--minutes", default=8.0, help="When to begin nothing more; what is left is named.")
@click.option("--quick", is_flag=True, help="A third of that time: fewer rounds.")
@click.option("--tiny", is_flag=True, help="Walk the code on tiny layers.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
@torch.inference_mode()
def main(
    shapes: str | None,
    dtypes: str | None,
    tokens: str | None,
    minutes: float,
    quick: bool,
    tiny: bool,
    path: Path | None,
) -> None:
    start, console = time.monotonic(), wide_console()
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # transformers'
    counts = sorted(map(int, _chosen("--tokens", tokens, {str(t): str(t) for t in TOKENS})))
    chosen = _chosen("--shapes", shapes, TINY if tiny else SHAPES)
    kinds = _chosen("--dtypes", dtypes, DTYPES)
    if path is None and not (shapes or dtypes or tokens or quick or tiny):
        path = _RESULTS
    end = start + 60 * minutes / (3 if quick else 1)
    cases, skipped = list[Case](), list[str]()
    todo = [(shape, dtype) for shape in chosen for dtype in kinds]
    for done, (shape, dtype) in enumerate(todo):
        share = time.monotonic() + (end - time.monotonic()) / (len(todo) - done)
        found, late = run_layer(console, shape, dtype, counts, share, end)
        gc.collect()  # compiled layers are held in circles
        print_cases(console, found)
        for what in late:
            console.print(f"no time left for {what}", markup=False)
        cases, skipped = cases + found, skipped + late
        finish(Console(quiet=True), "cpu", _results(cases, skipped, start), [], path)
    if path is not None:
        path.with_suffix(".svg").write_text(drawing(cases))
    goals = [] if tiny else targets(cases)
    raise SystemExit(finish(console, "cpu", _results(cases, skipped, start), goals, path))


def _results(cases: Sequence[Case], skipped: Sequence[str], start: float) -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "minutes": (time.monotonic() - start) / 60,
        "cases": [asdict(c) for c in cases],
        "skipped": list(skipped),
    }


def _chosen(option: str, text: str | None, known: Mapping[str, Choice]) -> list[Choice]:
    """The named ones, or all. Raises click.UsageError."""
    names = text.split(",") if text else list(known)
    if unknown := [n for n in names if n not in known]:
        raise click.UsageError(f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[n] for n in names]


if __name__ == "__main__":
    main()
