"""The parts of a comparison, a table each: sizes, operators, MoE layers, inputs and outputs, properties."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import groupby

from dsmoe_compiler.cli.diff_cells import fitted, printable, shortened
from dsmoe_compiler.cli.memory import readable
from dsmoe_compiler.graph_diff.change import Change
from dsmoe_compiler.graph_diff.compare import GraphDiff
from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Value
from dsmoe_compiler.report.grid import Column, Grid, Row
from dsmoe_compiler.report.layer_names import collapse
from dsmoe_compiler.report.story import INDENT, WHOLE_MODEL


def sizes_grid(diff: GraphDiff, width: int) -> Grid:
    a, b = diff.a, diff.b
    rows: list[tuple[str, int | None, int | None, Callable[[int], str]]] = [
        ("nodes", a.size.nodes, b.size.nodes, str),
        (INDENT[2:] + "in subgraphs", a.size.in_subgraphs, b.size.in_subgraphs, str),
        (INDENT[2:] + "in functions", a.size.in_functions, b.size.in_functions, str),
        ("kinds of operators", len(a.operators), len(b.operators), str),
        ("graph", a.size.graph_bytes, b.size.graph_bytes, readable),
        ("MoE layers", *_layer_counts(a.layers, b.layers), str),
        ("MoE layers fused", *_layer_counts(_fused(a), _fused(b)), str),
        ("tensors", len(a.tensors), len(b.tensors), str),
        ("data", a.size.data_bytes, b.size.data_bytes, readable),
    ]
    shown = (Row((name, *_counts(x, y, say))) for name, x, y, say in rows if x or y)
    return fitted(_counted("size"), shown, 0, width)


def _fused(facts: GraphFacts) -> list[Layer] | None:
    return None if facts.layers is None else [layer for layer in facts.layers if layer.fused]


def _layer_counts(a: Sequence[Layer] | None, b: Sequence[Layer] | None) -> tuple[int | None, int | None]:
    return None if a is None else len(a), None if b is None else len(b)


def _counted(title: str) -> tuple[Column, ...]:
    return (Column(title), *(Column(each, number=True) for each in ("A", "B", "change")))


def _counts(a: int | None, b: int | None, say: Callable[[int], str]) -> tuple[str, str, str]:
    """Two amounts and their difference."""
    change = "" if a is None or b is None or a == b else f"{'+' if b > a else '-'}{say(abs(b - a))}"
    return "?" if a is None else say(a), "?" if b is None else say(b), change


def operators_grid(diff: GraphDiff, width: int) -> Grid:
    """Those that are applied more or less often, the largest change first."""
    changes = sorted(diff.operators or (), key=lambda c: -abs((c.after or 0) - (c.before or 0)))
    rows = [Row((c.name, *_counts(c.before or 0, c.after or 0, str))) for c in changes]
    return fitted(_counted("operator"), rows, 0, width)


def layers_grid(diff: GraphDiff, width: int) -> Grid:
    """A row for the layers that changed alike, below it what they were and what they are."""
    rows = list[Row]()
    told = [(printable(c.name), *_what_changed(c)) for c in diff.layers or ()]
    for (before, after), alike in groupby(sorted(told, key=lambda t: t[1:]), key=lambda t: t[1:]):
        names = [name or WHOLE_MODEL for name, _, _ in alike]
        below = [
            line
            for side, facts in (("A", before), ("B", after))
            for line in textwrap.wrap(
                f"{INDENT}{side}  {facts}", width, subsequent_indent=INDENT + " " * 3, break_on_hyphens=False
            )
        ]
        rows.append(Row((shortened(collapse(names), width - 8), str(len(names))), tuple(below)))
    return Grid((Column("MoE layers"), Column("count", number=True)), tuple(rows))


def _what_changed(change: Change[Layer]) -> tuple[str, str]:
    """A layer before and after; by the whole specs where they read alike."""
    before, after = _layer(change.before), _layer(change.after)
    if before == after and change.before is not None and change.after is not None:
        return printable(change.before.text), printable(change.after.text)
    return before, after


def _layer(layer: Layer | None) -> str:
    if layer is None:
        return "none"
    if not layer.fused:
        return "as written"
    parts = (layer.router, layer.experts, layer.shared)
    return printable("fused: " + " | ".join(part for part in parts if part))


def values_grid(diff: GraphDiff, width: int) -> Grid:
    rows = [
        Row((word, change.name, _value(change.before), _value(change.after)))
        for word, changes in (("input", diff.inputs), ("output", diff.outputs))
        for change in changes
    ]
    return fitted((Column("interface"), Column("name"), Column("A"), Column("B")), rows, 1, width)


def _value(value: Value | None) -> str:
    return "none" if value is None else str(value.type)


def properties_grid(diff: GraphDiff, width: int) -> Grid:
    rows = [Row((c.name, c.before or "none", c.after or "none")) for c in diff.properties]
    return fitted((Column("property"), Column("A"), Column("B")), rows, 2, width)
