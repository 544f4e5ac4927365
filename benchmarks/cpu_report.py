"""What a run of benchmarks.cpu found: tables, targets and a drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cpu_case import Case
from benchmarks.cpu_shapes import SHAPES
from benchmarks.cpu_ways import NAMES, OURS, ROUTED
from benchmarks.gpu_plot import svg
from benchmarks.measure import Target, machine

SLOWEST_AGAINST_BEST = 1.03
_JUDGED = SHAPES["D1024"].name  # whose floors and leads are targets
# Up to so many tokens, at most so many times the floor.
_ROUTED_OVER_FLOOR = ((16, 1.15), (1024, 1.35))
_LAYER_OVER_FLOOR = ((128, 1.3), (1024, 1.5))
# By T: at least so many times faster than the best other way.
_LEAD = {
    "bfloat16": {1: 2.0, 16: 2.0, 128: 2.0, 1024: 1.8},
    "float32": {1: 1.15, 16: 1.15, 128: 1.8, 1024: 1.25},
}


def targets(cases: Sequence[Case]) -> list[Target]:
    """Never slower than the best; on the first shape near the floor, where there is AMX, and well ahead."""
    found, amx = list[Target](), "amx_bf16" in str(machine()["processor"])
    for c in cases:
        what, lead = f"{c.shape}, {c.dtype}, T={c.tokens}", c.figures[c.best].ours_faster
        found.append(Target(f"{what}: time over {c.best}'s", 1 / lead, SLOWEST_AGAINST_BEST))
        if c.shape != _JUDGED:
            continue
        if amx:
            for name, limits in ((ROUTED, _ROUTED_OVER_FLOOR), (OURS, _LAYER_OVER_FLOOR)):
                limit = next(times for most, times in limits if c.tokens <= most)
                found.append(Target(f"{what}: {name}, times the floor", c.figures[name].over_floor, limit))
        if (least := _LEAD[c.dtype].get(c.tokens)) is not None:
            found.append(Target(f"{what}: times faster than {c.best}", lead, least, at_least=True))
    return found


def print_cases(console: Console, cases: Sequence[Case]) -> None:
    """A table a layer and dtype: a row a way, a column a T; * is the best other. Below, why some are
    missing.
    """
    for group in _groups(cases):
        first = group[0]
        table = Table(
            title=f"{first.shape}, {first.dtype}, {torch.get_num_threads()} threads: ms, times the floor",
            title_justify="left",
        )
        table.add_column("T", min_width=len("torch.compile"))  # names are folded at their spaces
        for c in group:
            table.add_column(str(c.tokens), justify="right")
        table.add_row("experts with tokens", *(f"{c.touched:.1f}" for c in group))
        table.add_row("floor", *(_short(c.layer_floor) for c in group))
        table.add_row("floor, routed experts", *(_short(c.routed_floor) for c in group), end_section=True)
        for name in _ways(group):
            style = "bold" if name == OURS else None
            table.add_row(name, *(_cell(c, name) for c in group), style=style, end_section=name == ROUTED)
        table.add_section()
        table.add_row("ours: times faster than *", *(f"{c.figures[c.best].ours_faster:.2f}" for c in group))
        table.add_row("rounds kept", *(f"{c.rounds} of {c.rounds + c.discarded}" for c in group))
        console.print(table)
        _print_rates(console, group)
        _print_left_out(console, group)
        console.print()


def drawing(cases: Sequence[Case]) -> str:
    """A panel a layer and dtype, a line a way: time over the floor."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for c in cases:
        panel = panels.setdefault(f"{c.shape}, {c.dtype}", {})
        for name, figure in c.figures.items():
            panel.setdefault(name, []).append((c.tokens, figure.over_floor))
    return svg(panels, f"An MoE layer on a CPU, {torch.get_num_threads()} threads: time over the floor")


def _groups(cases: Sequence[Case]) -> Iterable[list[Case]]:
    grouped: dict[tuple[str, str], list[Case]] = {}
    for c in cases:
        grouped.setdefault((c.shape, c.dtype), []).append(c)
    return grouped.values()


def _ways(group: Sequence[Case]) -> list[str]:
    """Those that were timed at some T."""
    return [name for name in NAMES if any(name in c.figures for c in group)]


def _cell(c: Case, name: str) -> str:
    figure = c.figures.get(name)
    if figure is None:
        return "-"
    best = "*" if name == c.best else ""
    return f"{best}{_short(figure.milliseconds)} {_short(figure.over_floor)}×"


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _print_rates(console: Console, group: Sequence[Case]) -> None:
    """The range over the cases tells how steady the machine was."""
    memory = sorted(c.rates.memory / 1e9 for c in group)
    matmul = sorted(c.rates.matmul / 1e12 for c in group)
    by = ", ".join(dict.fromkeys(name for c in group for name in (c.rates.memory_by, c.rates.matmul_by)))
    console.print(
        f"rates of these rounds: {memory[0]:.1f} to {memory[-1]:.1f} GB/s, "
        f"{matmul[0]:.2f} to {matmul[-1]:.2f} TFLOP/s ({by})"
    )
    layers = {name: figure.layers for c in group for name, figure in c.figures.items()}
    fewer = [f"{n} of {name}" for name, n in layers.items() if n != layers[OURS]]
    console.print(", ".join([f"{layers[OURS]} layers take turns", *fewer]))


def _print_left_out(console: Console, group: Sequence[Case]) -> None:
    """A line a way: at which T it is missing, and why."""
    for name in NAMES:
        reasons: dict[str, list[str]] = {}
        for c in group:
            if (why := c.left_out.get(name)) is not None:
                reasons.setdefault(why, []).append(str(c.tokens))
        texts = [f"{why} (T={', '.join(tokens)})" for why, tokens in reasons.items()]
        if texts:
            console.print(f"- {name}: {'; '.join(texts)}", markup=False, highlight=False)
