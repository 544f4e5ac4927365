"""Every figure of the paper's tables, on models that are built, captured and measured."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from dsmoe_compiler import api
from dsmoe_compiler.cli.cost_paper import checked_row
from dsmoe_compiler.cost_model.convention import NotMeasured, measure
from dsmoe_compiler.cost_model.paper import RATIOS, ROWS, UNPUBLISHED, Figure, PaperRow, Ratio
from dsmoe_compiler.cost_model.paper_check import CheckedRow, check, ratios
from dsmoe_compiler.models import zoo

FAST = ("dense-0.2b", "deepseek-moe-2b", "deepseek-moe-16b")


def checked(row: PaperRow) -> CheckedRow:
    return checked_row(row, lambda stage: None)


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r.preset, marks=() if r.preset in FAST else pytest.mark.slow) for r in ROWS],
)
def test_a_row_is_within_its_tolerances(row: PaperRow) -> None:
    result = checked(row)
    missed = [
        (each.figure.quantity, each.figure.printed, each.ours, each.why)
        for each in result.compared
        if not each.ok
    ]
    assert not missed
    assert all(each.ours for each in result.compared)


@pytest.mark.slow
def test_ratios_are_within_a_tenth_of_a_percent() -> None:
    named = {ratio.row for ratio in RATIOS} | {ratio.against for ratio in RATIOS}
    rows = [checked(row) for row in ROWS if row.name in named]
    found = list(ratios(rows, RATIOS))
    assert [each.ratio for each in found] == list(RATIOS)
    assert [(each.ratio, each.ours) for each in found if not each.ok] == []


def test_a_ratio_needs_both_its_rows() -> None:
    rows = [CheckedRow(ROWS[0], (), 30), CheckedRow(ROWS[1], (), 40)]
    known, unknown = Ratio(ROWS[0].name, ROWS[1].name, 75.05), Ratio(ROWS[0].name, "another", 1.0)
    (found,) = ratios(rows, (known, unknown))
    assert (found.ours, found.ok) == (75.0, True)
    (found,) = ratios(rows, (replace(known, printed=75.2),))
    assert not found.ok


def test_the_tables_name_presets_and_do_not_contradict_themselves() -> None:
    assert {row.preset for row in ROWS} <= set(zoo.names())
    assert len({row.name for row in ROWS}) == len(ROWS)
    names = {row.name for row in ROWS}
    assert all({ratio.row, ratio.against} <= names for ratio in RATIOS)
    assert not {each.name for each in UNPUBLISHED} & names


def test_another_model_misses() -> None:
    """Half as many experts chosen is not what the row prints."""
    row = next(row for row in ROWS if row.preset == "deepseek-moe-2b")
    result = checked(replace(row, preset="deepseek-moe-2b-half"))
    missed = {each.figure.quantity for each in result.compared if not each.ok}
    assert missed == {"activated", "activated expert parameters", "training FLOPs"}


def test_a_skipped_figure_is_never_missed() -> None:
    row = replace(ROWS[0], preset="dense-tiny", tokens=8, figures=(Figure("parameters", "671", 0.01, "why"),))
    assert checked(row).ok
    assert not checked(replace(row, figures=(Figure("parameters", "671", 0.01),))).ok


def test_the_convention_by_hand() -> None:
    """Two layers, D=96, four heads of queries to two of keys and values, V=512, a feed-forward 352 wide."""
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    done = api.optimize(zoo.build("dense-tiny", device="meta"), (ids,), dynamic_shapes=None, verify="off")
    measured = measure(done.graph, done.report, 8)
    assert (measured.width, measured.queries, measured.dense) == (96, (96 * 96,) * 2, (3 * 96 * 352,) * 2)
    attention, head = 2 * 4 * 96 * 8 * 8, 2 * 8 * 96 * 512
    assert (measured.attention, measured.head) == (attention, head)
    built = 3 * (attention + head + 2 * 8 * 2 * (4 * 96**2 + 3 * 96 * 352))
    nominal = 3 * (attention + head + 2 * 8 * 2 * (4 * 96**2 + 8 * 96**2))
    assert measured.training_flops(None) == built
    assert measured.training_flops(Fraction(1)) == nominal


def test_the_first_dense_layer_counts_as_a_mixture() -> None:
    """Three layers, the first dense; 4 of 16 experts and 2 shared, each 88 wide."""
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    model = zoo.build("deepseek-moe-tiny", device="meta")
    done = api.optimize(model, (ids,), dynamic_shapes=None, verify="off")
    measured = measure(done.graph, done.report, 8)
    assert {(each.used, each.activated) for each in measured.layers} == {(6, 6 * 3 * 96 * 88)}
    assert measured.expert_weights == 2 * 18 * 3 * 96 * 88 + 3 * 96 * 352
    assert measured.routers == 2 * 16 * 96
    attention, head = 3 * 4 * 96 * 8 * 8, 2 * 8 * 96 * 512
    per_layer = 4 * 96**2 + 6 * 3 * 96 * 88
    assert measured.training_flops(None) == 3 * (attention + head + 2 * 8 * 3 * per_layer)


@pytest.mark.parametrize("name", ["switch-tiny", "gshard-tiny"])
def test_a_router_as_written_is_no_feed_forward(name: str) -> None:
    """Three layers, the first dense; 6 experts."""
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    model = zoo.build(name, device="meta")
    done = api.optimize(model, (ids,), dynamic_shapes=None, verify="off")
    measured = measure(done.graph, done.report, 8)
    assert (measured.routers, len(measured.dense), len(measured.layers)) == (2 * 6 * 112, 1, 2)


def test_a_layer_that_is_not_fused_is_not_measured() -> None:
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    model = zoo.build("deepseek-moe-tiny", device="meta")
    done = api.optimize(model, (ids,), dynamic_shapes=None, verify="off")
    refused = replace(done.report, layers=tuple(replace(x, fused=False) for x in done.report.layers))
    with pytest.raises(NotMeasured, match=r"model\.layers\.1\.mlp is not fused"):
        measure(done.graph, refused, 8)
    result = check(replace(ROWS[0], tokens=8), done.graph, refused)
    assert [each.ours is None for each in result.compared] == [False, True, True]
    assert not result.ok
