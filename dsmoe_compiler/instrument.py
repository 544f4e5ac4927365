"""Watching a pipeline: what it calls around each pass, and what it says of one that has run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import LayerFacts, Pass, Replacement
from dsmoe_compiler.report.remarks import PassRemark
from dsmoe_compiler.report.report import PassReport


@dataclass(frozen=True)
class PassRun:
    """One pass as it ran.

    `found` counts the layers it was the first to list, `replaced` the values it replaced, `taken_back` those
    of them that validation put back. `layers` is what is known of every layer after it, `changes` are the
    replacements that stand.
    """

    report: PassReport
    found: int
    replaced: int
    taken_back: int
    remarks: tuple[PassRemark, ...]
    layers: tuple[LayerFacts, ...] = ()
    changes: tuple[Replacement, ...] = ()

    @property
    def fused(self) -> int:
        """How many parts of layers (experts, router, shared experts) it fused."""
        return sum(remark.kind == "passed" for remark in self.remarks)

    @property
    def refused(self) -> int:
        """How many it left as they were, saying why."""
        return sum(remark.kind == "missed" for remark in self.remarks)


class Instrument(Protocol):
    """Watches passes run; the seconds it takes are nobody's."""

    def before(self, step: Pass, graph: ProgramGraph) -> None:
        """Called before a pass sees the graph."""
        ...

    def after(self, step: Pass, graph: ProgramGraph, run: PassRun) -> None:
        """Called when a pass's work is checked and its dead values are gone."""
        ...
