"""Plans of a model's layers, as tables to read and as data."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from dsmoe_compiler.cli.kernels_model import FusedModel
from dsmoe_compiler.cli.stages import Stage
from dsmoe_compiler.report.grid import Column, Grid, Row
from dsmoe_compiler.report.layer_names import collapse
from dsmoe_compiler.report.story import WHOLE_MODEL

if TYPE_CHECKING:
    from dsmoe_compiler.runtime.kernels import FusedLayer, GemmTiles, GemvTiles, Gpu, Plan, Planned

LEGEND = (
    "T: tokens of a call. tiles: rows×columns×depth of a grouped product, outputs×depth of a matrix-vector "
    "one. grid: programs of a persistent kernel. µs: a layer by the analytical model, which is no "
    "measurement. plan: from the model, the committed table, or your own --tune."
)


@dataclass(frozen=True)
class PlannedLayer:
    """A distinct layer and its plans; `why` there are none, where there are none."""

    fused: FusedLayer
    plans: tuple[Planned, ...]
    why: str = ""


@dataclass(frozen=True)
class Plans:
    """The answer of `dsmoe kernels MODEL`."""

    model: FusedModel
    gpu: Gpu
    layers: tuple[PlannedLayer, ...]
    notes: tuple[str, ...] = ()

    def print(self, as_json: bool) -> None:
        """As tables, or as one JSON record."""
        if as_json:
            click.echo(json.dumps(self._record(), indent=2))
        else:
            self._print()

    def _record(self) -> dict[str, Any]:
        from dsmoe_compiler.runtime.kernels import TRITON

        report = self.model.report
        return {
            "model": report.model,
            "fused": report.fused,
            "of": len(report.layers),
            "gpu": self.gpu.name,
            "target": self.gpu.target,
            "triton": TRITON,
            "kernels": [record(layer) for layer in self.layers],
        }

    def _print(self) -> None:
        from dsmoe_compiler.cli.paint import console, print_grid, print_lines, reading_width

        to = console()
        width = reading_width(to)
        print_lines(to, textwrap.wrap(self._headline(), width), style="bold")
        for layer in self.layers:
            to.print()
            print_lines(to, textwrap.wrap(title(layer.fused), width), style="bold cyan")
            print_lines(to, described(layer.fused, width), style="dim")
            if layer.why:
                print_lines(to, textwrap.wrap(f"no kernels: {layer.why}; it runs by the reference", width))
            else:
                print_grid(to, plans_grid(layer.plans))
        report, below = self.model.report, list[str]()
        if report.fused < len(report.layers):
            below += textwrap.wrap(f"why the others are not fused: dsmoe explain {self.model.text}", width)
        if any(layer.plans for layer in self.layers):
            below += textwrap.wrap(LEGEND, width)
        if below:
            to.print()
            print_lines(to, below, style="dim")

    def _headline(self) -> str:
        from dsmoe_compiler.runtime.kernels import TRITON

        report = self.model.report
        if not report.layers:
            return f"{report.model}: no Mixture-of-Experts layers; the model runs unchanged"
        fused = f"{report.model}: {report.fused} of {len(report.layers)} MoE layers fused"
        return f"{fused}; kernels for {named(self.gpu)}, Triton {TRITON}"


def plans_of(model: FusedModel, tokens: Sequence[int], gpu: Gpu, stage: Stage) -> Plans:
    """The plans of a model's distinct layers."""
    stage("plan")
    return Plans(model, gpu, tuple(plan_layer(fused, tokens, gpu) for fused in model.layers))


def plan_layer(fused: FusedLayer, tokens: Sequence[int], gpu: Gpu) -> PlannedLayer:
    """The layer's plans for these numbers of tokens."""
    from dsmoe_compiler.runtime.kernels import Unsupported, planned, text_of

    try:
        plans = tuple(planned(fused, each, gpu) for each in tokens)
        # Whether all of its terms can be written down does not depend on the number of tokens.
        text_of(fused, plans[0])
    except Unsupported as e:
        return PlannedLayer(fused, (), str(e))
    return PlannedLayer(fused, plans)


def named(gpu: Gpu) -> str:
    """ "NVIDIA H200 (sm_90)"; a GPU of which only the target is known by that."""
    return gpu.name if gpu.name == gpu.target else f"{gpu.name} ({gpu.target})"


def title(fused: FusedLayer) -> str:
    """Which layers these are: "model.layers.{1-27}.mlp (27 layers)"."""
    names = collapse(name or WHOLE_MODEL for name in fused.names)
    return f"{names} ({len(fused.names)} layers)" if len(fused.names) > 1 else names


def described(fused: FusedLayer, width: int) -> list[str]:
    """What these layers are, and what of them is not in kernels."""
    lines = [f"{fused.spec}, {fused.dtype}"]
    if fused.spec.router is not None and fused.layer.router is None:
        lines.append("the router runs by the reference: no kernel routes so")
    if fused.layer.added:
        lines.append("the shared experts run by the reference: their body has no kernels")
    return [part for line in lines for part in textwrap.wrap(line, width)]


def plans_grid(plans: Sequence[Planned]) -> Grid:
    """A line for each kernel that a plan decides about."""
    measured = any(plan.measured is not None for plan in plans)
    columns = [
        Column("T", number=True),
        Column("kernel"),
        Column("tiles", number=True),
        Column("warps", number=True),
        Column("stages", number=True),
        Column("options"),
        Column("grid", number=True),
        Column("µs", number=True),
        *([Column("measured", number=True)] if measured else []),
        Column("plan"),
    ]
    rows = []
    for plan in plans:
        measurement = (_microseconds(plan.measured),) if measured else ()
        last = (_microseconds(plan.predicted), *measurement, plan.origin)
        for first, cells in enumerate(_kernels(plan)):
            begin, end = ("", ("",) * len(last)) if first else (str(plan.tokens), last)
            rows.append(Row((begin, *cells, *end)))
    return Grid(tuple(columns), tuple(rows))


def _kernels(plan: Planned) -> Iterator[tuple[str, ...]]:
    yield from _two(plan.choice.plan, "decode " if is_decode(plan.choice.plan) else "grouped ")
    if plan.choice.shared is not None:
        yield from _two(plan.choice.shared, "shared ")


def _two(plan: Plan, kind: str) -> Iterator[tuple[str, ...]]:
    programs = str(getattr(plan, "programs", ""))
    for name, tiles in (("up", plan.up), ("down", plan.down)):
        yield (f"{kind}{name}", shape(tiles), str(tiles.warps), str(tiles.stages), options(tiles), programs)


def shape(tiles: GemmTiles | GemvTiles) -> str:
    """ "128×128×64", or "32×128" of a matrix-vector product."""
    sizes = [getattr(tiles, name, None) for name in ("rows", "columns", "depth")]
    return "×".join(str(size) for size in sizes if size is not None)


def options(tiles: GemmTiles | GemvTiles) -> str:
    """What else is decided: "tma swap", "split 4"."""
    told = [name for name in ("tma", "swap") if getattr(tiles, name, False)]
    if getattr(tiles, "registers", 0):
        told.append(f"r≤{getattr(tiles, 'registers', 0)}")
    if getattr(tiles, "split", 1) > 1:
        told.append(f"split {getattr(tiles, 'split', 1)}")
    return " ".join(told)


def is_decode(plan: Plan) -> bool:
    """Whether nothing is sorted: matrix-vector products."""
    from dsmoe_compiler.runtime.kernels import Decode

    return isinstance(plan, Decode)


def _microseconds(time: float | None) -> str:
    if time is None:
        return ""
    return f"{time:.1f}" if time < 1000 else f"{time:.0f}"


def record(planned: PlannedLayer) -> dict[str, Any]:
    """A layer's plans as data; times in microseconds."""
    fused = planned.fused
    return {
        "layers": list(fused.names),
        "spec": fused.spec.text,
        "dtype": fused.dtype,
        "why_no_kernels": planned.why or None,
        "plans": [plan_record(plan) for plan in planned.plans],
    }


def plan_record(plan: Planned) -> dict[str, Any]:
    """A plan as data."""
    shared = plan.choice.shared
    return {
        "tokens": plan.tokens,
        "bucket": plan.choice.tokens,
        "kernels": "decode" if is_decode(plan.choice.plan) else "grouped",
        **asdict(plan.choice.plan),
        "shared": None if shared is None else asdict(shared),
        "from": plan.origin,
        "predicted_microseconds": round(plan.predicted, 3),
        "measured_microseconds": plan.measured,
    }
