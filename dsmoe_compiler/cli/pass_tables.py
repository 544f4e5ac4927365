"""What passes took and did, as tables and as JSON; and the list of all passes."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict
from typing import Any

from dsmoe_compiler.instrument import PassRun
from dsmoe_compiler.ir.passes import Pass
from dsmoe_compiler.option_text import describe, write
from dsmoe_compiler.pipeline_text import options
from dsmoe_compiler.report.grid import Column, Grid, Row

INDENT, WIDTH = "    ", 80


def timing(capture_seconds: float, runs: Sequence[PassRun]) -> Grid:
    """Seconds and share of capture and each pass, its checking included."""
    spent = _spent(capture_seconds, runs)
    total = sum(seconds for _, seconds in spent)
    rows = [(name, f"{seconds:.4f}", f"{_share(seconds, total):.1%}") for name, seconds in spent]
    columns = (Column("pass"), Column("seconds", number=True), Column("share", number=True))
    return Grid(columns, tuple(map(Row, [*rows, ("total", f"{total:.4f}", f"{1:.1%}")])))


def statistics(runs: Sequence[PassRun]) -> Grid:
    """Nodes, layers and replacements of each pass."""
    numbers = ("nodes", "layers found", "fused", "refused", "replaced", "taken back", "max error")
    rows = (
        Row(
            (
                run.report.name,
                f"{run.report.nodes_before} → {run.report.nodes_after}",
                *map(str, (run.found, run.fused, run.refused, run.replaced, run.taken_back)),
                "-" if run.report.max_error is None else f"{run.report.max_error:.1e}",
            ),
            alert=bool(run.refused or run.taken_back),
        )
        for run in runs
    )
    return Grid((Column("pass"), *(Column(title, number=True) for title in numbers)), tuple(rows))


def as_records(capture_seconds: float, runs: Sequence[PassRun]) -> list[dict[str, Any]]:
    """Both tables, a record a pass; capture is the first, with its seconds alone."""
    spent = _spent(capture_seconds, runs)
    total = sum(seconds for _, seconds in spent)
    (captured, *passes) = [
        {"name": name, "seconds": seconds, "share": _share(seconds, total)} for name, seconds in spent
    ]
    return [
        captured,
        *(
            times
            | asdict(run.report)
            | {"layers_found": run.found, "fused": run.fused, "refused": run.refused}
            | {"replaced": run.replaced, "taken_back": run.taken_back}
            for times, run in zip(passes, runs, strict=True)
        ),
    ]


def listing(passes: Mapping[str, type[Pass]]) -> Iterable[str]:
    """Each pass: its name, what it does, its options with their types and defaults."""
    for name, step in passes.items():
        yield name
        yield from textwrap.wrap(_summary(step), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
        yield from (f"{INDENT}{option}" for option in options(step))


def listing_records(passes: Mapping[str, type[Pass]]) -> list[dict[str, Any]]:
    """The same for JSON; values as they are written in a pipeline."""
    return [
        {
            "name": name,
            "summary": _summary(step),
            "options": [
                {
                    "name": option.name,
                    "type": describe(option.kind),
                    "default": None if option.default is MISSING else write(option.default),
                }
                for option in options(step)
            ],
        }
        for name, step in passes.items()
    ]


def _spent(capture_seconds: float, runs: Sequence[PassRun]) -> list[tuple[str, float]]:
    return [("capture", capture_seconds), *((run.report.name, run.report.seconds) for run in runs)]


def _share(seconds: float, total: float) -> float:
    return seconds / total if total else 0.0


def _summary(step: type[Pass]) -> str:
    """The first sentence of the docstring, which may stand on several lines."""
    return " ".join((inspect.getdoc(step) or "").split("\n\n")[0].split())
