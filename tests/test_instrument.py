"""Instruments see every pass before and after it, with what it did and what validation took back."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler import pipeline
from dsmoe_compiler.capture import capture
from dsmoe_compiler.cli.ir_dumps import IRDumps, Moments, shower
from dsmoe_compiler.instrument import PassRun
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import Pass, PassLog
from dsmoe_compiler.ir.printer import print_graph
from dsmoe_compiler.passes.lift_experts import LiftExperts
from dsmoe_compiler.passes.normalize import Normalize
from tests.tiny_models import Experts


@dataclass(frozen=True)
class WrongActivation:
    """Lifts the experts with another activation than theirs."""

    name: ClassVar[str] = "wrong_activation"

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        changed = LiftExperts().run(graph, log)
        for node in graph.nodes:
            if node.target is ops.EXPERTS:
                x, ids, weights, params, spec = node.args
                node.args = (x, ids, weights, params, str(spec).replace("silu", "gelu"))
        return changed


@dataclass
class Witness:
    """Writes down what it is told, and the graph's text with it."""

    told: list[tuple[str, str, str]] = field(default_factory=list)
    runs: list[PassRun] = field(default_factory=list)

    def before(self, step: Pass, graph: ProgramGraph) -> None:
        self.told.append(("before", step.name, print_graph(graph)))

    def after(self, step: Pass, graph: ProgramGraph, run: PassRun) -> None:
        self.told.append(("after", step.name, print_graph(graph)))
        self.runs.append(run)


@pytest.fixture
def graph() -> ProgramGraph:
    return ProgramGraph(capture(Experts(), (torch.randn(5, 16),)).exported)


def test_passes_are_seen_in_order_on_one_graph(graph: ProgramGraph) -> None:
    witness, steps = Witness(), (Normalize(), LiftExperts())
    outcome = pipeline.run(graph, steps, "numeric", instruments=(witness,))
    assert [(moment, name) for moment, name, _ in witness.told] == [
        (moment, step.name) for step in steps for moment in ("before", "after")
    ]
    texts = [text for _, _, text in witness.told]
    assert texts[1] == texts[2] and "dsmoe.experts" not in texts[2]
    assert texts[3] == print_graph(graph) and "dsmoe.experts" in texts[3]
    assert tuple(run.report for run in witness.runs) == outcome.passes
    assert [(r.found, r.replaced, r.taken_back, r.fused, r.refused) for r in witness.runs] == [
        (0, 0, 0, 0, 0),
        (1, 1, 0, 1, 0),
    ]


def test_what_validation_took_back_is_counted_and_has_changed_nothing(graph: ProgramGraph) -> None:
    witness, dumps = Witness(), list[str]()
    changes = Moments(frozenset(), frozenset(), after_all=False, after_change=True)
    printing = IRDumps(changes, shower(None), lambda moment, step, text: dumps.append(step))
    pipeline.run(graph, (Normalize(), WrongActivation()), "numeric", instruments=(witness, printing))
    wrong = witness.runs[1]
    assert (wrong.found, wrong.replaced, wrong.taken_back, wrong.fused, wrong.refused) == (1, 1, 1, 0, 1)
    assert wrong.report.changed, "it did propose a change"
    assert "wrong_activation" not in dumps
    (remark,) = wrong.remarks
    assert (remark.kind, remark.text[:5]) == ("missed", "R304:")


def test_a_pipeline_may_be_given_as_text() -> None:
    model, x = Experts(), torch.randn(5, 16)
    program = dsmoe.compile(model, (x,), pipeline="normalize,lift_experts")
    assert [each.name for each in program.report.passes][1:3] == ["normalize", "lift_experts"]
    (layer,) = program.report.layers
    assert layer.spec is not None and layer.spec.router is None
    assert dsmoe.compile(model, (x,), pipeline="").report.layers == ()
    with pytest.raises(dsmoe.InputError, match="unknown pass 'lift'; the nearest names are: lift_experts"):
        dsmoe.compile(model, (x,), pipeline="lift")
