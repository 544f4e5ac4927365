"""A report arranged for reading: headline, MoE map, passes, remarks. Text and terminal both print this."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.grid import Column, Grid, Row
from dsmoe_compiler.report.layer_names import collapse
from dsmoe_compiler.report.report import LayerReport, PassReport, Report

INDENT = "    "
WHOLE_MODEL = "(model)"  # the name of a layer that is the model itself
Cell: TypeAlias = Callable[[MoESpec], str]


@dataclass(frozen=True)
class Story:
    """`layers` is None where there are none; `legend` says once what is the same in every row of it."""

    headline: tuple[str, ...]
    layers: Grid | None
    legend: tuple[str, ...]
    passes: Grid | None
    remarks: tuple[str, ...]


def tell(report: Report, width: int) -> Story:
    """Arrange a report for a page `width` characters wide.

    Every layer keeps a line of its own. Where whole specs make the map too wide, its cells hold their short
    form and the legend the whole one.
    """
    layers, shortened = (None, False) if not report.layers else _map(report.layers, width)
    legend = [
        *_common(report.layers),
        *(_whole_specs(report.layers) if shortened else []),
        *([f"on a CPU: {report.kernels}"] if _would_run(report) else []),
    ]
    return Story(
        tuple(_wrapped([_headline(report)], width)),
        layers,
        tuple(_wrapped(legend, width)),
        _passes(report.passes) if report.passes else None,
        tuple(_wrapped(_remarks(report), width)),
    )


def _headline(report: Report) -> str:
    if not report.layers:
        return f"{report.model}: no Mixture-of-Experts layers; the model runs unchanged"
    facts = [report.capture]
    if report.backend:
        facts.append(f"backend {report.backend}" + (f" ({report.kernels})" if report.kernels else ""))
    return f"{report.model}: {report.fused} of {len(report.layers)} MoE layers fused; {', '.join(facts)}"


def _would_run(report: Report) -> bool:
    """Whether nothing was compiled, and it is known what a CPU would run the fused layers by."""
    return report.backend is None and bool(report.kernels) and report.fused > 0


def _map(layers: tuple[LayerReport, ...], width: int) -> tuple[Grid, bool]:
    """The map with the longest cells that fit, and whether that meant shortening a spec."""
    whole = _layer_grid(layers, width, _router, _experts)
    if whole.width <= width:
        return whole, False
    short_routers = _layer_grid(layers, width, _short_router, _experts)
    if short_routers.width <= width:
        return short_routers, True
    return _layer_grid(layers, width, _short_router, _short_experts), True


def _layer_grid(layers: tuple[LayerReport, ...], width: int, router: Cell, experts: Cell) -> Grid:
    columns = [
        Column("layer"),
        Column("E", number=True),
        Column("router"),
        Column("experts"),
        Column("shared"),
    ]
    varying = [fact for fact in ("idiom", "source") if not _same(layers, fact)]
    rows = (
        Row(
            (
                layer.name or WHOLE_MODEL,
                *_spec_cells(layer, router, experts),
                *(getattr(layer, fact) for fact in varying),
            ),
            below=_refusal_lines(layer.refusal, width) if layer.refusal else (),
            alert=not layer.fused,
        )
        for layer in layers
    )
    return Grid((*columns, *(Column(fact) for fact in varying)), tuple(rows))


def _spec_cells(layer: LayerReport, router: Cell, experts: Cell) -> tuple[str, str, str, str]:
    spec = layer.spec
    if spec is None:
        return "", "as written", "as written", ""
    return str(spec.experts.count), router(spec), experts(spec), _shared(spec)


def _router(spec: MoESpec) -> str:
    return str(spec.router) if spec.router else f"top-{spec.top_k}, as written"


def _short_router(spec: MoESpec) -> str:
    if spec.router is None:
        return _router(spec)
    return str(replace(spec.router, renormalize=False, scale=1.0, groups=1, top_groups=1, weigh="scores"))


def _experts(spec: MoESpec) -> str:
    return str(spec.experts)


def _short_experts(spec: MoESpec) -> str:
    whole, layout = str(spec.experts), spec.experts.layout
    return whole.replace(f" {layout}", "", 1) if layout else whole


def _shared(spec: MoESpec) -> str:
    if spec.shared is None:
        return "-"
    return f"{spec.shared.width} gated" if spec.shared.gated else str(spec.shared.width)


def _refusal_lines(refusal: Refusal, width: int) -> tuple[str, ...]:
    where = ", ".join(
        part for part in (f"at %{refusal.node}" if refusal.node else "", refusal.source) if part
    )
    lines = [f"{refusal.code} {refusal.because}", *([where] if where else [])]
    return tuple(part for line in lines for part in _fold(line, width, INDENT, INDENT + "     "))


def _same(layers: tuple[LayerReport, ...], fact: str) -> bool:
    return len({getattr(layer, fact) for layer in layers}) < 2


def _common(layers: tuple[LayerReport, ...]) -> list[str]:
    """What holds for every layer and has therefore no column."""
    facts = [fact for fact in ("idiom", "source") if layers and _same(layers, fact)]
    common = [f"{fact} {value}" for fact in facts if (value := getattr(layers[0], fact))]
    return [("every layer: " if len(layers) > 1 else "") + "; ".join(common)] if common else []


def _whole_specs(layers: tuple[LayerReport, ...]) -> list[str]:
    names: dict[str, list[str]] = {}
    for layer in layers:
        if layer.spec:
            names.setdefault(str(layer.spec), []).append(layer.name)
    return [f"{collapse(which)}: {spec}" for spec, which in names.items()]


def _passes(passes: tuple[PassReport, ...]) -> Grid:
    columns = (
        Column("pass"),
        Column("ms", number=True),
        Column("nodes", number=True),
        Column("max error", number=True),
    )
    return Grid(columns, tuple(Row(_pass_cells(each)) for each in passes))


def _pass_cells(each: PassReport) -> tuple[str, str, str, str]:
    before, after = each.nodes_before, each.nodes_after
    nodes = f"{before} → {after}" if before not in (0, after) else str(after or "-")
    error = "-" if each.max_error is None else f"{each.max_error:.1e}"
    return each.name, f"{1e3 * each.seconds:.1f}", nodes, error


def _remarks(report: Report) -> list[str]:
    """The whole program's check, the report's remarks, and the layers' own, each told once."""
    remarks = list(report.remarks)
    if report.program_error is not None:
        remarks.insert(0, f"whole program against the model: relative error {report.program_error:.1e}")
    names: dict[str, list[str]] = {}
    for layer in report.layers:
        for remark in layer.remarks:
            names.setdefault(remark, []).append(layer.name)
    return remarks + [f"{collapse(which)}: {remark}" for remark, which in names.items()]


def _wrapped(lines: list[str], width: int) -> list[str]:
    return [part for line in lines for part in _fold(line, width, "", INDENT)]


def _fold(line: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        line,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
