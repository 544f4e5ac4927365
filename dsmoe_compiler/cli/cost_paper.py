"""`dsmoe cost --paper`: the DeepSeekMoE paper's tables beside the models of the zoo, built and counted."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dsmoe_compiler.cli.stages import Stage, load_modules, stages
from dsmoe_compiler.cost_model.paper import RATIOS, ROWS, UNPUBLISHED, PaperRow, Quantity, Unpublished
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.nearest import unknown
from dsmoe_compiler.report.grid import Column, Grid, Row

if TYPE_CHECKING:
    from dsmoe_compiler.cost_model.paper_check import CheckedRatio, CheckedRow, Compared

LEGEND = (
    "B: billions of parameters, as built; activated are those that a token uses, K of E experts. T: 10¹² "
    "FLOPs of training on one sequence, measured and then counted as the paper counts: docs/cost.md says "
    "what that substitutes."
)
_SHORT: dict[Quantity, str] = {
    "expert parameters": "in experts",
    "activated expert parameters": "activated in experts",
}


def checked_against_paper(text: str | None, as_json: bool) -> bool:
    """Print the rows, only those of the preset `text` where it is given. Whether all are within tolerance.

    Raises InputError for a name that no row has.
    """
    rows = _rows(text)
    with stages() as stage:
        load_modules(stage, "dsmoe_compiler.api")
        from dsmoe_compiler.cost_model.paper_check import ratios

        checked = [checked_row(row, stage) for row in rows]
        quotients = list(ratios(checked, RATIOS))
    unpublished = () if text else UNPUBLISHED
    good = all(each.ok for each in checked) and all(each.ok for each in quotients)
    if as_json:
        click.echo(json.dumps(_record(checked, quotients, unpublished, good), indent=2))
    else:
        _print(checked, quotients, unpublished)
    return good


def checked_row(row: PaperRow, stage: Stage) -> CheckedRow:
    """Build, capture and check one model; stages are told by its name alone, there are many."""
    import torch

    from dsmoe_compiler import api
    from dsmoe_compiler.cost_model.paper_check import check
    from dsmoe_compiler.models import zoo

    stage(row.preset)
    model = zoo.build(row.preset, device="meta")
    sequence = torch.zeros(1, row.tokens, dtype=torch.int64, device="meta")
    # Captured at the one size that is counted, which takes half the time of every size.
    done = api.optimize(model, (), {"input_ids": sequence}, dynamic_shapes=None, verify="off")
    return check(row, done.graph, done.report)


def _rows(text: str | None) -> tuple[PaperRow, ...]:
    rows = tuple(row for row in ROWS if text in (None, row.preset))
    if not rows:
        raise InputError(unknown("model of the paper", str(text), [row.preset for row in ROWS]))
    return rows


def _print(
    rows: Sequence[CheckedRow], ratios: Sequence[CheckedRatio], unpublished: Sequence[Unpublished]
) -> None:
    from dsmoe_compiler.cli.paint import console, print_grid, print_lines, reading_width

    to = console()
    width = reading_width(to)
    titles = ("printed", "ours", "off by", "within")
    columns = (Column("DeepSeekMoE paper"), *(Column(title, number=True) for title in titles), Column(""))
    lines = [line for row in rows for line in _lines(row)]
    print_grid(to, Grid(columns, (*lines, *_ratio_lines(ratios))))
    remarks = [
        *_remarks(rows),
        *(f"{each.name}, {each.source}: {each.printed}; {each.why}" for each in unpublished),
    ]
    for remark in remarks:
        print_lines(to, textwrap.wrap(remark, width, subsequent_indent="    "))
    print_lines(to, textwrap.wrap(LEGEND, width), style="dim")
    missed = sum(not each.ok for row in rows for each in row.compared) + sum(not each.ok for each in ratios)
    figures = sum(not each.figure.skipped for row in rows for each in row.compared) + len(ratios)
    verdict = f"{figures - missed} of {figures} figures within their tolerance"
    print_lines(to, [verdict], style="bold yellow" if missed else "bold green")


def _lines(checked: CheckedRow) -> Iterator[Row]:
    yield Row((f"{checked.row.name}, {checked.row.source}", "", "", "", "", ""))
    for each in checked.compared:
        figure = each.figure
        decimals = len(figure.printed.partition(".")[2]) + 1  # one more than is printed
        ours = "-" if each.ours is None else f"{each.ours / figure.scale:.{decimals}f} {figure.unit}"
        off = "-" if each.difference is None else f"{each.difference:+.1%}"
        within = "skipped" if figure.skipped else f"{figure.tolerance:.1%}"
        name = _SHORT.get(figure.quantity, figure.quantity)
        yield Row(
            (f"  {name}", f"{figure.printed} {figure.unit}", ours, off, within, _verdict(each)),
            alert=not each.ok,
        )


def _verdict(each: Compared) -> str:
    if each.figure.skipped:
        return ""
    return "ok" if each.ok else "MISSED"


def _ratio_lines(ratios: Sequence[CheckedRatio]) -> Iterator[Row]:
    if ratios:
        yield Row(("DeepSeekMoE's training FLOPs", "", "", "", "", ""))
    for each in ratios:
        ratio = each.ratio
        ours = "-" if each.ours is None else f"{each.ours:.2f} %"
        off = "-" if each.ours is None else f"{each.ours - ratio.printed:+.2f}"
        name = f"  {ratio.row.removeprefix('DeepSeekMoE ')} to {ratio.against}"
        cells = (name, f"{ratio.printed} %", ours, off, f"{ratio.tolerance:g}")
        yield Row((*cells, "ok" if each.ok else "MISSED"), alert=not each.ok)


def _remarks(rows: Sequence[CheckedRow]) -> Iterator[str]:
    for checked in rows:
        whys = dict.fromkeys(each.why for each in checked.compared if each.why and each.ours is None)
        skips = [
            f"{each.figure.quantity}: {each.figure.skipped}"
            for each in checked.compared
            if each.figure.skipped
        ]
        for said in (*([checked.row.note] if checked.row.note else []), *skips, *whys):
            yield f"{checked.row.name}: {said}"


def _record(
    rows: Sequence[CheckedRow], ratios: Sequence[CheckedRatio], unpublished: Sequence[Unpublished], good: bool
) -> dict[str, Any]:
    return {
        "ok": good,
        "rows": [
            {
                "name": each.row.name,
                "preset": each.row.preset,
                "source": each.row.source,
                "tokens": each.row.tokens,
                "note": each.row.note or None,
                "ok": each.ok,
                "figures": [_figure_record(one) for one in each.compared],
            }
            for each in rows
        ],
        "ratios": [asdict(each.ratio) | {"ours": each.ours, "ok": each.ok} for each in ratios],
        "unpublished": [asdict(each) for each in unpublished],
    }


def _figure_record(each: Compared) -> dict[str, Any]:
    return {
        "quantity": each.figure.quantity,
        "printed": each.figure.value,
        "ours": each.ours,
        "difference": each.difference,
        "tolerance": each.figure.tolerance,
        "skipped": each.figure.skipped or None,
        "why_none": each.why or None,
        "ok": each.ok,
    }
