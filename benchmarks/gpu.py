"""Generated kernels on a GPU against its ceilings and against other ways to run the same experts.

    python -m benchmarks.gpu [--shapes S1,S3,S5] [--tokens 1,8,…] [--minutes 7] [--json PATH]
                             [--vllm-kernel PATH] [--sglang-kernel PATH]
    python -m benchmarks.gpu --plans 8 [--store]

Every answer is compared with one in float32 first; then all ways take turns as CUDA graphs over several sets
of weights and routings (gpu_clock.py, gpu_inputs.py). The floor is from a copy and a product measured in the
same run. vLLM's and SGLang's kernels take part where they are installed, or where their file is given. What
no time is left for is named. The figures are written after every layer, with a drawing beside them.

`--plans N` times the N plans that the model ranks first instead, and tells where another than the chosen one
wins; `--store` keeps the winners in the user's table, from which one can be committed (codegen/tuned.py).

Without a GPU, `TRITON_INTERPRET=1 python -m benchmarks.gpu --dry` walks the same code on tiny layers; its
times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_case import TOLERANCE, Bench, Case, measure, of_group
from benchmarks.gpu_clock import ceilings
from benchmarks.gpu_floor import DRY_SHAPES, DRY_TOKENS
from benchmarks.gpu_foreign import installed, kernel_of
from benchmarks.gpu_inputs import ROUTINGS, Weights, all_weights, sets
from benchmarks.gpu_peers import GROUPED, LAYER, OURS
from benchmarks.gpu_plans import Contest, contest, of_one_processor
from benchmarks.gpu_plot import svg
from benchmarks.measure import ROOT, Target, finish, wide_console
from benchmarks.moe_shapes import SHAPES, TOKENS, Shape
from dsmoe_compiler.codegen import tuned
from dsmoe_compiler.codegen.gpu import for_target, of_device

DEFAULT = ("S1", "S3", "S5")
VLLM, SGLANG = "vLLM's kernel", "SGLang's kernel"
# What is shown of the peers: the fastest of each group, in figures of ours.
GROUPS = (GROUPED, "transformers", "torch.compile", VLLM, SGLANG)


@dataclass(frozen=True)
class Goal:
    """What uniform routing should reach up to so many tokens: at most that many times the floor, and at least
    so many times faster than torch's grouped product and than vLLM's kernel.
    """

    tokens: int
    over_floor: float
    faster_than_grouped: float
    faster_than_vllm: float


GOALS = (
    Goal(1, 1.6, 3.0, 1.5),
    Goal(8, 1.25, 2.0, 1.3),
    Goal(64, 1.15, 1.3, 1.0),
    Goal(512, 1.15, 1.3, 1.0),
    Goal(4096, 1.45, 1.25, 1.3),
    Goal(16384, 1.35, 1.15, 1.2),
)


@dataclass(frozen=True)
class Budget:
    """When a run has to be over, by the monotonic clock, in seconds."""

    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def run_peers(
    shape: Shape, tokens: Sequence[int], bench: Bench, budget: Budget, skipped: list[str]
) -> list[Case]:
    """Uniform routings first, at every T; then skewed ones; ways that compile only where half of the layer's
    time is left.
    """
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    copies = all_weights(shape, dtype, bench.device)
    begin, cases = budget.left, list[Case]()
    for routing in ROUTINGS:
        for count in tokens:
            what = f"{shape.name}, T={count}, {routing}"
            if budget.left <= 0:
                skipped.append(what)
                continue
            compiles = routing == "uniform" and budget.left > 0.5 * begin
            if routing == "uniform" and not compiles:
                skipped.append(f"{what}: torch.compile")
            cases.append(measure(shape, sets(shape, count, routing, copies), routing, bench, compiles))
    return cases


def run_plans(
    shape: Shape,
    tokens: Sequence[int],
    bench: Bench,
    budget: Budget,
    skipped: list[str],
    count: int,
    store: bool,
) -> list[Contest]:
    """A contest of plans at every T."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    copies: list[Weights] = all_weights(shape, dtype, bench.device)
    found = list[Contest]()
    for number in tokens:
        if budget.left <= 0:
            skipped.append(f"{shape.name}, T={number}")
            continue
        inputs = sets(shape, number, "uniform", copies)
        outcome, winner = contest(shape, inputs, bench.gpu, count, bench.seconds, TOLERANCE)
        found.append(outcome)
        if store and winner is not None:
            tuned.store(dict([winner]), bench.gpu, triton.__version__)
    return found


def print_cases(console: Console, cases: Sequence[Case]) -> None:
    """One row a case; of each group of peers its fastest, and how many times faster ours is."""
    table = Table(title="µs a layer's routed experts (times the floor)", title_justify="left")
    for column in ("layer", "routing"):
        table.add_column(column)
    for column in ("T", "floor", OURS, "spread", *GROUPS, LAYER):
        table.add_column(column, justify="right")
    for c in cases:
        ours = c.figures[OURS]
        theirs = [of_group(c, group)[1] for group in GROUPS]
        cells = [f"{us:.1f} ({us / ours.times.microseconds:.2f})" if us < 1e12 else "-" for us in theirs]
        whole = c.figures.get(LAYER)
        table.add_row(
            c.shape,
            c.routing,
            str(c.tokens),
            f"{c.floor:.1f}",
            f"{ours.times.microseconds:.1f} ({ours.over_floor:.2f}×)",
            f"{max(ours.times.spread, ours.times.drift):.1%}",
            *cells,
            f"{whole.times.microseconds:.1f} ({whole.over_floor:.2f}×)" if whole else "-",
        )
    console.print(table)
    for c in cases:
        for name, why in c.left_out.items():
            console.print(f"{c.shape}, T={c.tokens}, {c.routing}: without {name}: {why}", markup=False)


def print_contests(console: Console, contests: Sequence[Contest]) -> None:
    """One row each: the chosen plan, the winner, and how many times faster that is."""
    table = Table(title="plans: chosen, and the fastest measured", title_justify="left")
    for column in ("layer", "T", "chosen µs", "predicted", "best µs", "gain", "best plan"):
        table.add_column(column, overflow="fold")
    for c in contests:
        chosen = c.tried[0]
        ran = [(t.microseconds, t.plan) for t in c.tried if t.microseconds is not None]
        best, plan = min(ran) if ran else (float("nan"), "none ran")
        table.add_row(
            c.shape,
            str(c.tokens),
            f"{chosen.microseconds:.1f}" if chosen.microseconds else str(chosen.failed),
            f"{chosen.predicted:.1f}",
            f"{best:.1f}",
            "-" if c.gain is None else f"{c.gain:.2f}",
            plan,
        )
    console.print(table)


def targets(cases: Sequence[Case]) -> list[Target]:
    """The goals, for what was measured of them."""
    found = []
    for c in cases:
        if c.routing != "uniform":
            continue
        goal = next(g for g in GOALS if c.tokens <= g.tokens or g is GOALS[-1])
        ours, what = c.figures[OURS], f"{c.shape}, T={c.tokens}"
        found.append(Target(f"{what}: times the floor", ours.over_floor, goal.over_floor))
        for group, least in ((GROUPED, goal.faster_than_grouped), (VLLM, goal.faster_than_vllm)):
            name, theirs = of_group(c, group)
            if name:
                ratio = theirs / ours.times.microseconds
                found.append(Target(f"{what}: against {group}", ratio, least, at_least=True))
    return found


def drawing(cases: Sequence[Case], gpu: str) -> str:
    """Uniform routing: ours and the fastest of each group of peers, times the floor."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for c in cases:
        if c.routing == "uniform":
            panel = panels.setdefault(c.shape, {})
            for group in (OURS, *GROUPS):
                us = c.figures[OURS].times.microseconds if group == OURS else of_group(c, group)[1]
                if us < 1e12:
                    panel.setdefault(group, []).append((c.tokens, us / c.floor))
    return svg(panels, f"Routed experts, bfloat16, {gpu}: time over the floor")


def foreign_kernels(vllm: Path | None, sglang: Path | None) -> dict[str, Any]:
    """Their kernels, from the files given, else from what is installed. Raises click.UsageError."""
    files = {VLLM: vllm or installed("vllm"), SGLANG: sglang or installed("sglang")}
    try:
        return {name: kernel_of(file) for name, file in files.items() if file is not None}
    except (OSError, ValueError, SyntaxError) as e:
        raise click.UsageError(str(e)) from e


def _bench(dry: bool, foreign: Mapping[str, Any]) -> Bench:
    interpreted = bool(triton.knobs.runtime.interpret)
    if dry and not interpreted:
        raise click.UsageError("--dry interprets the kernels: set TRITON_INTERPRET=1")
    if dry:
        cpu = torch.device("cpu")
        return Bench(cpu, of_one_processor(for_target("sm_90")), ceilings(cpu), foreign, seconds=0.01)
    if interpreted or not torch.cuda.is_available():
        raise click.UsageError("needs a CUDA device, and kernels that are compiled; see --dry")
    device = torch.device("cuda", torch.cuda.current_device())
    return Bench(device, of_device(), ceilings(device), foreign, seconds=0.8)


def _names(text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    names = text.split(",") if text else list(default)
    if unknown := [n for n in names if n not in known]:
        raise click.UsageError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise click.UsageError(f"--tokens {text}: give numbers above 0 with commas, 1,64,4096")
    return [int(n) for n in numbers]


@click.command(help="Generated kernels on a GPU against its ceilings and against other ways.")
@click.option("--shapes", help=f"Layers, with commas; {','.join(DEFAULT)} unless given.")
@click.option("--tokens", help="Numbers of tokens, with commas.")
@click.option("--minutes", default=7.0, help="When to begin nothing more; what is left is named.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option("--plans", default=0, help="Time that many of the best candidate plans instead.")
@click.option("--store", is_flag=True, help="Keep the fastest plans in the user's table.")
@click.option("--vllm-kernel", type=click.Path(path_type=Path), help="The file of vLLM's.")
@click.option(
    "--sglang-kernel", type=click.Path(path_type=Path), help="SGLang's fused_moe_triton_kernels.py."
)
@click.option("--dry", is_flag=True, help="Walk the code on tiny layers, without a GPU.")
@torch.no_grad()
def main(
    shapes: str | None,
    tokens: str | None,
    minutes: float,
    path: Path | None,
    plans: int,
    store: bool,
    vllm_kernel: Path | None,
    sglang_kernel: Path | None,
    dry: bool,
) -> None:
    budget = Budget(time.monotonic() + 60 * minutes)
    console = wide_console()
    known = DRY_SHAPES if dry else SHAPES
    chosen = [known[n] for n in _names(shapes, list(known), list(known) if dry else DEFAULT)]
    counts = _numbers(tokens) if tokens else list(DRY_TOKENS if dry else TOKENS)
    torch.manual_seed(0)
    bench = _bench(dry, foreign_kernels(vllm_kernel, sglang_kernel))
    if path is None and not dry:
        path = ROOT / "benchmarks" / "results" / ("gpu_plans.json" if plans else "gpu.json")
    cases, contests, skipped = list[Case](), list[Contest](), list[str]()
    for done, shape in enumerate(chosen):
        share = Budget(time.monotonic() + budget.left / (len(chosen) - done))
        if plans:
            contests += run_plans(shape, counts, bench, share, skipped, plans, store)
        else:
            cases += run_peers(shape, counts, bench, share, skipped)
        finish(Console(quiet=True), "gpu", _results(bench, cases, contests, skipped), [], path)
        if path is not None and cases:
            path.with_suffix(".svg").write_text(drawing(cases, bench.gpu.name))
    if plans:
        print_contests(console, contests)
    else:
        print_cases(console, cases)
    memory, matmul = bench.ceilings.memory / 1e12, bench.ceilings.matmul / 1e12
    console.print(f"ceilings of this run: {memory:.2f} TB/s, {matmul:.0f} TFLOP/s")
    for what in skipped:
        console.print(f"no time left for {what}", markup=False)
    goals = [] if dry else targets(cases)
    status = finish(console, "gpu", _results(bench, cases, contests, skipped), goals, path)
    raise SystemExit(status)


def _results(
    bench: Bench, cases: Sequence[Case], contests: Sequence[Contest], skipped: Sequence[str]
) -> dict[str, object]:
    on_gpu = bench.device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(bench.device) if on_gpu else "none: a dry run",
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "ceilings": asdict(bench.ceilings),
        "cases": [asdict(c) for c in cases],
        "plans": [asdict(c) for c in contests],
        "skipped": list(skipped),
    }


if __name__ == "__main__":
    main()
