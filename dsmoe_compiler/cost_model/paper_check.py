"""A built model beside what is printed of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsmoe_compiler.cost_model.convention import Measured, NotMeasured, measure
from dsmoe_compiler.cost_model.cost import Parameters, parameters_of
from dsmoe_compiler.cost_model.paper import Figure, PaperRow, Quantity, Ratio
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.report.report import Report


@dataclass(frozen=True)
class Compared:
    """A figure and ours, None where there is none and then why. A skipped figure is compared with nothing."""

    figure: Figure
    ours: float | None
    why: str = ""

    @property
    def difference(self) -> float | None:
        """Relative to what is printed."""
        return None if self.ours is None else self.ours / self.figure.value - 1

    @property
    def ok(self) -> bool:
        """Whether it is within its tolerance, or skipped."""
        within = self.difference is not None and abs(self.difference) <= self.figure.tolerance
        return within or bool(self.figure.skipped)


@dataclass(frozen=True)
class CheckedRow:
    """A row, its figures compared, and its training FLOPs, which ratios are made of."""

    row: PaperRow
    compared: tuple[Compared, ...]
    training_flops: int | None

    @property
    def ok(self) -> bool:
        """Whether every figure is."""
        return all(each.ok for each in self.compared)


@dataclass(frozen=True)
class CheckedRatio:
    """A ratio and ours in percent, None where a row of it has no FLOPs."""

    ratio: Ratio
    ours: float | None

    @property
    def ok(self) -> bool:
        """Whether it is within its tolerance."""
        return self.ours is not None and abs(self.ours - self.ratio.printed) <= self.ratio.tolerance


def check(row: PaperRow, graph: ProgramGraph, report: Report) -> CheckedRow:
    """The row's figures beside those of its model after the passes."""
    parameters = parameters_of(graph)
    try:
        measured, why = measure(graph, report, row.tokens), ""
    except NotMeasured as e:
        measured, why = None, str(e)
    flops = measured.training_flops(row.part) if measured else None
    compared = tuple(
        Compared(figure, _ours(figure.quantity, row, parameters, measured, flops), why)
        for figure in row.figures
    )
    return CheckedRow(row, compared, flops)


def ratios(rows: Sequence[CheckedRow], stated: Sequence[Ratio]) -> Iterator[CheckedRatio]:
    """The stated ratios both of whose rows were checked."""
    flops = {each.row.name: each.training_flops for each in rows}
    for ratio in stated:
        if ratio.row in flops and ratio.against in flops:
            above, below = flops[ratio.row], flops[ratio.against]
            yield CheckedRatio(ratio, 100 * above / below if above and below else None)


def _ours(
    quantity: Quantity, row: PaperRow, parameters: Parameters, measured: Measured | None, flops: int | None
) -> float | None:
    if quantity == "parameters":
        return parameters.total
    if measured is None:
        return None
    if quantity == "activated":
        left_out = 0 if row.lookup_activated else parameters.lookup
        return parameters.activated - measured.routers - left_out
    if quantity == "expert parameters":
        return measured.expert_weights
    if quantity == "activated expert parameters":
        return measured.activated_expert_weights
    return flops
