"""How far a refused layer was understood: values in words, the way to the one lost, what would fuse."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir.body import Terms
from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.explanation import Explanation
from dsmoe_compiler.passes.lift import describe, values
from dsmoe_compiler.passes.lift.formula import formula
from dsmoe_compiler.passes.lift.known_spellings import SPELLINGS
from dsmoe_compiler.report.report import Report
from tests.passes import refusals
from tests.passes.checks import compiled
from tests.passes.lookalikes import other_ids_down, wrong_divisor
from tests.passes.loops import Case
from tests.passes.loops import D as WIDTH
from tests.passes.loops import layer as loop_layer
from tests.passes.refusals import Forward, Layer
from tests.passes.spellings import Spec, layer


def inspected(made: nn.Module, width: int = refusals.D) -> Report:
    return dsmoe.inspect(made, (torch.ones(2, 5, width),))


def explained(made: nn.Module, width: int = refusals.D) -> tuple[Refusal, Explanation]:
    (found,) = inspected(made, width).layers
    assert found.refusal is not None and found.explanation is not None
    return found.refusal, found.explanation


def means(explanation: Explanation, what: str) -> str:
    (found,) = (m.means for m in explanation.moments if m.what == what)
    return found


def test_every_class_of_value_has_words_of_its_own() -> None:
    assert set(describe.PHRASES) == set(get_args(values.Value))


def test_a_value_that_has_no_words_is_called_by_its_name() -> None:
    class SeveralThings:
        pass

    found: Any = SeveralThings()
    nothing: Any = None
    assert describe.describe(nothing, found) == "several things"


def gated(terms: Terms) -> int:
    x, gate, up = (terms.number(op, (), (n,)) for op, n in (("token", "x"), ("expert", "g"), ("expert", "u")))
    hidden = terms.number("silu", (terms.number("linear", (x, gate)),))
    return terms.number("mul", (hidden, terms.number("linear", (x, up))))


def test_a_term_reads_as_a_formula() -> None:
    terms = Terms()
    term = gated(terms)
    names = {"g": "gate", "u": "up"}
    assert formula(terms, term, names) == "silu(x·gate_e) * (x·up_e)"
    weighed = terms.number(
        "mul", (terms.number("slice", (term,), (0, 4, 2)), terms.number("pair", (), ("w",)))
    )
    assert formula(terms, weighed, names) == "(silu(x·gate_e) * (x·up_e))[:4:2] * w"
    assert formula(terms, weighed, names, longest=20) == "(… * …)[:4:2] * w"
    assert formula(terms, weighed, names, longest=3) == "…"


def test_the_last_value_that_was_understood() -> None:
    refusal, explanation = explained(Layer(refusals.rows_meet_each_other))
    assert [m.what for m in explanation.moments] == [
        *("ids chosen", "ids first used", "rows begin", "last understood", "lost")
    ]
    assert means(explanation, "rows begin") == "rows of the tokens, 2 times each: x, width 16"
    last = "rows of the pairs in their own order: relu(x·up_e)·down_e, width 16"
    assert means(explanation, "last understood") == last
    assert [s.name for s in explanation.nearest] == ["gathered weights, batched GEMM"]
    lost = explanation.moments[-1]
    assert (lost.node, lost.operator) == (refusal.node, "aten::mean")
    assert [line.function for line in lost.lines] == ["forward", "rows_meet_each_other"]
    assert lost.lines[-1].text == refusal.text == "return combined(y - y.mean(0), weights)"


def _statistics(m: Layer, x: Tensor) -> Tensor:
    """How often each expert is chosen is counted first, and changes nothing of what is lost later."""
    weights, ids = refusals.route(m, x)
    load = torch.nn.functional.one_hot(ids, refusals.E).cummax(0).values.sum()
    y = refusals.pairs(m, x, ids).cumsum(-1)
    return refusals.combined(y, weights) + 0 * load


def test_statistics_of_the_routing_are_not_what_is_lost() -> None:
    assert "cumsum" in explained(Layer(_statistics))[0].because


@pytest.mark.parametrize(
    ("forward", "remedy"),
    [
        (refusals.never_brought_back, "perm.argsort()"),
        (refusals.another_divisor, "perm // K"),
        (refusals.sorted_from_the_last, "ascending"),
        (refusals.tokens_by_rounding, "perm // K"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_it_would_take(forward: Forward, remedy: str) -> None:
    _, explanation = explained(Layer(forward))
    assert remedy in explanation.remedy
    assert "sorted, grouped GEMM" in [s.name for s in explanation.nearest]


def _across_rows(m: Layer, x: Tensor) -> Tensor:
    weights, ids = refusals.route(m, x)
    return refusals.combined(refusals.pairs(m, x, ids).cumsum(0), weights)


def _along_the_width(m: Layer, x: Tensor) -> Tensor:
    weights, ids = refusals.route(m, x)
    return refusals.combined(refusals.pairs(m, x, ids).cumsum(-1), weights)


def _of_other_pairs(m: Layer, x: Tensor) -> Tensor:
    weights, ids = refusals.route(m, x)
    return refusals.combined(refusals.pairs(m, x, ids) + refusals.pairs(m, x, ids.flip(1)), weights)


@pytest.mark.parametrize(
    ("forward", "remedy"),
    [
        (_across_rows, "keep the rows apart"),
        (_along_the_width, "let an expert's rows pass only"),
        (_of_other_pairs, "rows of the same pairs"),
    ],
)
def test_what_it_would_take_where_rows_are_lost(forward: Forward, remedy: str) -> None:
    _, explanation = explained(Layer(forward))
    assert remedy in explanation.remedy


def test_nothing_understood_has_no_nearest_spelling() -> None:
    _, explanation = explained(Layer(refusals.experts_choose))
    assert explanation.nearest == ()
    assert [m.what for m in explanation.moments] == ["ids chosen", "lost"]


def _sorted_by_hand(m: Any, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(4):
        tokens, slots = torch.where(ids == e)
        out.index_add_(0, tokens, m.experts[e](x[slots]) * w[tokens, slots, None])
    return out


def test_of_two_values_that_meet_the_one_that_was_lost_first() -> None:
    """x[slots] has no meaning; that its product with a weight has none either follows."""
    refusal, explanation = explained(loop_layer(Case(_sorted_by_hand)), WIDTH)
    assert refusal.code == "R410" and "the slots in which tokens chose expert 0" in refusal.because
    assert "x[slots]" in refusal.text and "by the tokens" in explanation.remedy


def test_values_named_in_the_reason_have_their_lines() -> None:
    refusal, explanation = explained(Layer(refusals.input_overwritten))
    (named,) = (m for m in explanation.moments if m.what.startswith("%"))
    assert named.what in refusal.because and named.lines[-1].text.startswith("y = self.way(")


def test_helper_functions_are_named() -> None:
    refusal, explanation = explained(layer(Spec(wrong_divisor)))
    assert refusal.source.startswith("lookalikes.py:")
    assert [line.file for line in explanation.moments[-1].lines] == ["spellings.py", "lookalikes.py"]


def test_a_fused_layer_says_how_it_was_understood() -> None:
    (found,) = inspected(Layer(refusals.as_it_should_be)).layers
    assert found.fused and found.explanation is not None
    assert [m.what for m in found.explanation.moments][-1] == "combined"
    told = "each token's sum over rows of the pairs in their own order: (relu(x·up_e)·down_e) * w, width 16"
    assert means(found.explanation, "combined") == told


def test_a_router_that_was_left_is_told_with_its_line() -> None:
    (found,) = inspected(Layer(refusals.scores_by_tanh)).layers
    (left,) = found.left
    assert left.what == "router as written" and left.refusal is not None
    assert ".tanh()" in left.refusal.text


def test_a_saved_program_explains_the_same(tmp_path: Any) -> None:
    program = compiled(layer(Spec(other_ids_down)))
    program.save(tmp_path / "m.pt2")
    assert dsmoe.load(tmp_path / "m.pt2").report.layers == program.report.layers


def test_a_report_without_explanations_is_read() -> None:
    report = inspected(Layer(refusals.scores_by_tanh))
    text = report.to_json().replace('"explanation":', '"ignored":').replace('"left":', '"ignored too":')
    record = json.loads(text)
    for entry in record["layers"]:
        del entry["ignored"], entry["ignored too"]
    (found,) = Report.from_json(json.dumps(record)).layers
    assert (found.explanation, found.left) == (None, ())


def test_spellings_have_names_of_their_own() -> None:
    assert len({spelling.name for spelling in SPELLINGS}) == len(SPELLINGS)
