"""Folding keeps account of every operator, and folds what is alike and nothing else."""

import networkx as nx
import pytest

from dsmoe_compiler.report.drawing.fold import sketch
from dsmoe_compiler.report.drawing.layer_graph import Given, LayerGraph, Operator, Parameter
from dsmoe_compiler.report.drawing.sketch import Card, Sketch
from tests.report.layers_to_draw import FEW, LAYERS, MANY, drawn


def titled(drawing: Sketch, title: str) -> list[Card]:
    return [card for card in drawing.cards if card.title == title]


@pytest.mark.parametrize("name", LAYERS)
def test_every_operator_is_on_one_card(name: str) -> None:
    anatomy = drawn(name)
    for graph in (anatomy.before, anatomy.after):
        if graph is not None:
            cards = sketch(graph).cards
            members = [member for card in cards for member in card.members]
            assert sorted(members) == sorted(operator.name for operator in graph.operators)


@pytest.mark.parametrize("name", LAYERS)
def test_arrows_lead_from_the_inputs_to_the_results(name: str) -> None:
    drawing = sketch(drawn(name).before)
    flow = nx.DiGraph(drawing.arrows)
    assert set(flow) == {card.key for card in drawing.cards}
    assert nx.is_directed_acyclic_graph(flow)
    assert {n for n in flow if not flow.in_degree(n)} == {c.key for c in drawing.cards if c.kind == "given"}
    assert {n for n in flow if not flow.out_degree(n)} == {c.key for c in drawing.cards if c.kind == "result"}


@pytest.mark.parametrize(("name", "experts"), [("few", FEW), ("many", MANY)])
def test_experts_of_a_loop_are_one(name: str, experts: int) -> None:
    drawing = sketch(drawn(name).before)
    body = [card for card in drawing.cards if card.role == "experts"]
    assert {card.copies for card in body} == {experts}
    assert sorted(card.title for card in body) == ["linear", "linear", "linear", "mul", "silu"]
    assert any(line.startswith(f"@experts.{{0..{experts - 1}}}.w1") for card in body for line in card.lines)
    (summed,) = titled(drawing, "index_add")
    assert summed.copies == experts, "the sum that every expert adds to in turn"


def test_the_picture_does_not_grow_with_the_experts() -> None:
    few, many = sketch(drawn("few").before), sketch(drawn("many").before)
    assert len(few.cards) == len(many.cards) and len(few.arrows) == len(many.arrows)


def test_what_is_only_similar_stays_apart() -> None:
    shared = [c for c in sketch(drawn("few").before).cards if c.role == "shared" and c.title == "linear"]
    assert len(shared) == 3 and {card.copies for card in shared} == {1}


def three(reads: tuple[str, str, str]) -> LayerGraph:
    """Three products with weights of one shape, of whatever each reads."""
    weights = [Parameter(f"@.{name}", "f32[4, 4]") for name in "abc"]
    products = [
        Operator(f"%{i}", "linear", "f32[T, 4]", "experts", (read,), (weights[i],), f"%{i} = linear")
        for i, read in enumerate(reads)
    ]
    return LayerGraph((Given("%x", "f32[T, 4]"),), tuple(products), ("%2",), 0, 0, "")


def test_one_after_the_other_is_not_side_by_side() -> None:
    deep = sketch(three(("%x", "%0", "%1")))
    assert [card.copies for card in deep.cards if card.kind == "operator"] == [1, 1, 1]


def test_where_understanding_ended_is_marked() -> None:
    lost = [card for card in sketch(drawn("refused").before).cards if card.lost]
    assert [card.title for card in lost] == ["cumsum"] and lost[0].copies == FEW


def test_the_fused_op_says_its_parts() -> None:
    after = drawn("few").after
    assert after is not None
    (fused,) = [card for card in sketch(after).cards if card.kind == "fused"]
    assert [section.role for section in fused.sections] == ["router", "experts", "combine", "shared"]
    said = [line for section in fused.sections for line in section.lines]
    assert f"p0 @experts.{{0..{FEW - 1}}}.w1.weight [{FEW}, 8, 16]" in said
