"""What every default plan's kernels take of a GPU: registers, spills, shared memory, instructions. No GPU is
needed.

    python -m benchmarks.static [--target sm_90 …] [--shapes S1 S3] [--tokens 1 4096] [--write]

Compiles every kernel that the plans for S1 … S6 launch and prints a line for each; `--write` replaces the
committed table, benchmarks/results/static_{target}.csv, which tests/codegen/test_static.py reads.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import triton

from benchmarks.moe_shapes import SHAPES, TOKENS, Shape
from dsmoe_compiler.codegen.choice import choice_of
from dsmoe_compiler.codegen.gpu import for_target
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.record import Launch, launches
from dsmoe_compiler.codegen.resources import Resources, compile_launch, resources

TARGETS = ("sm_90", "sm_80", "gfx942")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Line:
    """One kernel of one layer's plan."""

    shape: str
    tokens: int
    kernel: str
    tile: str
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    resident: int
    wgmma: int
    mma: int
    tma_loads: int
    cp_async: int


def launched(shape: Shape, tokens: int, target: str, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The launches of a layer for a bucket of tokens, its tensors on the meta device."""
    layer = shape.layer(dtype)
    module = load(module_of(layer, choice_of(layer, tokens, for_target(target), triton.__version__)))

    def empty(sizes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        return [torch.empty(s, dtype=dtype, device="meta") for s in sizes]

    given: dict[str, object] = {
        "x": torch.empty(tokens, shape.hidden, dtype=dtype, device="meta"),
        "router": empty(shape.router_params),
        "params": empty(shape.params),
    }
    if layer.shared:
        given["shared"] = empty(shape.shared_params)
    return launches(module, lambda: module.layer(**given))


def line(shape: Shape, tokens: int, launch: Launch, took: Resources) -> Line:
    """The table's line of a launch."""
    sizes = [str(launch.arguments[n]) for n in ("ROWS", "COLUMNS", "DEPTH") if n in launch.arguments]
    return Line(
        shape.name,
        tokens,
        launch.name,
        "x".join(sizes),
        launch.options.get("num_warps", 4),
        launch.options.get("num_stages", 3),
        took.registers,
        took.spill_stores,
        took.spill_loads,
        took.shared,
        took.resident,
        took.wgmma,
        took.mma,
        took.tma_loads,
        took.cp_async,
    )


def lines(
    target: str, shapes: Sequence[str], tokens: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> Iterator[Line]:
    """The table of a target; a kernel that two plans launch alike is compiled once."""
    seen = dict[str, Resources]()
    for shape in (SHAPES[name] for name in shapes):
        for count in tokens:
            for launch in launched(shape, count, target, dtype):
                compiled = compile_launch(launch.kernel, launch.arguments, launch.options, target)
                text = compiled.text("ttgir")
                if text not in seen:
                    seen[text] = resources(compiled)
                yield line(shape, count, launch, seen[text])


def read(target: str) -> list[Line]:
    """The committed table of a target."""
    kinds: list[type] = [str if f.type == "str" else int for f in fields(Line)]
    with table(target).open(newline="") as file:
        _, *rows = csv.reader(file)
    return [Line(*(kind(text) for kind, text in zip(kinds, row, strict=True))) for row in rows]


def table(target: str) -> Path:
    """The committed table's file."""
    return RESULTS / f"static_{target}.csv"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=TARGETS)
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--write", action="store_true", help="replace the committed table of each target")
    chosen = parser.parse_args()
    names = [f.name for f in fields(Line)]
    for target in chosen.target:
        print(f"{target}, Triton {triton.__version__}")
        print("".join(f"{n:>13}" for n in names))
        found = list[Line]()
        for each in lines(target, chosen.shapes, chosen.tokens):
            print("".join(f"{getattr(each, n)!s:>13}" for n in names), flush=True)
            found.append(each)
        if chosen.write:
            with table(target).open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(names)
                writer.writerows([getattr(each, n) for n in names] for each in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
