"""Explanations arranged for reading: alike layers once, widths kept, what is left told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.explanation import Explanation, Moment, SourceLine, Spelling
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.explained import group, page
from dsmoe_compiler.report.report import LayerReport, Left, Report

FORWARD = SourceLine("mine.py", 4, "forward", "y = self.mix(rows)")
HELPER = SourceLine("mine.py", 9, "mix", "return rows.cumsum(0)")
REFUSAL = Refusal("R301", "cumsum is not known on these rows", "cumsum_1", "mine.py:9", HELPER.text)
SPELLING = Spelling("rows per pair", "y = W[ids] @ x\nout = y.sum(1)", "a sum over the slots " * 6)


def _explanation(node: str) -> Explanation:
    moments = (
        Moment("ids chosen", "aten::topk", "topk", "", (FORWARD,)),
        Moment(
            "last understood", "aten::bmm", "bmm", "rows of the pairs: " + "x·up_e * " * 15 + "w", (FORWARD,)
        ),
        Moment("lost", "aten::cumsum", node, "", (FORWARD, HELPER)),
    )
    return Explanation(moments, (SPELLING,), "sum the rows over the slots, " * 5)


def _refused(name: str, node: str = "cumsum") -> LayerReport:
    refusal = replace(REFUSAL, node=node, because=f"cumsum is not known beside %{node}")
    return LayerReport(name, "unknown", False, None, refusal, "mine.py:4", (), _explanation(node))


def _report(*layers: LayerReport) -> Report:
    return Report("Mine", "plain export", layers, ())


def _text(report: Report, layers: tuple[LayerReport, ...], width: int) -> str:
    return "\n".join(line.text for line in page(report, group(layers), width))


def test_layers_refused_alike_are_one() -> None:
    layers = tuple(_refused(f"layers.{i}.mlp", f"cumsum_{i}") for i in range(3))
    other = replace(_refused("head"), refusal=Refusal("R408", "it is overwritten", "x", "mine.py:9"))
    assert [alike.names for alike in group((*layers, other))] == [
        ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp"),
        ("head",),
    ]
    text = _text(_report(*layers, other), (*layers, other), 100)
    assert text.startswith("layers.{0-2}.mlp (3 layers alike): not fused\n")
    assert text.count("R301: ") == text.count("R408: ") == 1


def test_the_line_at_which_it_ended_and_its_callers() -> None:
    text = _text(_report(_refused("mlp")), (_refused("mlp"),), 100)
    at = "  mine.py:9, in mix\n      return rows.cumsum(0)\n  called at mine.py:4, in forward\n"
    assert at + "      y = self.mix(rows)\n" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_sentences_keep_to_the_width_and_code_is_whole(width: int) -> None:
    layer = _refused("model.layers.0.block_sparse_moe")
    text = _text(_report(layer), (layer,), width)
    assert max(map(len, text.splitlines())) <= width
    assert "      y = W[ids] @ x\n      out = y.sum(1)\n" in text
    assert "sum the rows over the slots, sum" in " ".join(text.split())


def test_nothing_to_explain() -> None:
    report = _report()
    assert _text(report, (), 80) == "Mine: no Mixture-of-Experts layers; the model runs unchanged"


def test_what_was_left_is_told_where_all_are_fused(router_as_written: MoESpec) -> None:
    why = Refusal("R201", "the scores come from tanh", "tanh", "mine.py:2", "scores = logits.tanh()")
    layer = LayerReport(
        "mlp",
        "rows per pair",
        True,
        router_as_written,
        None,
        "mine.py:4",
        (),
        None,
        (Left("router as written", why),),
    )
    told = _text(_report(layer), (), 80).splitlines()
    assert told == ["nothing to explain: the one layer fused", "mlp: router as written; --layer 0 says why"]
    whole = _text(_report(layer), (layer,), 100)
    assert "  router    as written: R201: the scores come from tanh\n" in whole
    assert "scores = logits.tanh()" in whole and "to fuse it: the experts are fused all the same" in whole


def test_an_older_report_without_explanation() -> None:
    layer = LayerReport("mlp", "unknown", False, None, REFUSAL, "mine.py:4")
    text = _text(_report(layer), (layer,), 80)
    assert "mine.py:9\n      return rows.cumsum(0)\n" in text and "\nto fuse it\n" in text
