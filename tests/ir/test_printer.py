"""Textual IR says the same of the same program however it was captured, and nothing of where it lay."""

import re

import torch

from dsmoe_compiler.capture import capture
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.printer import print_graph
from tests.passes import spellings
from tests.passes.spellings import Spec, layer


def text(shape: tuple[int, ...], *, modules: bool = False) -> str:
    made = layer(Spec(spellings.gathered, shared="gated"))
    graph = ProgramGraph(capture(made, (torch.randn(*shape, 16),)).exported)
    return print_graph(graph, modules=modules)


def test_the_example_leaves_no_trace() -> None:
    assert text((2, 5)) == text((2, 5)) == text((3, 11))


def test_only_values_sizes_and_parameters_have_names() -> None:
    lines = text((2, 5)).splitlines()
    names = set(re.findall(r"%(\w+)", "\n".join(lines)))
    assert names - {"x"} == {str(i) for i in range(len(lines) - 2)}, "values are numbered in order"
    assert set(re.findall(r"\bs(\d+)", "\n".join(lines))) == {"0", "1"}
    assert "@experts.gate_up" in "\n".join(lines) and "0x" not in "\n".join(lines)


def test_modules_are_said_where_they_change_and_no_parameter_says_it() -> None:
    lines = text((2, 5), modules=True).splitlines()
    marks = [line for line in lines if line.startswith("#")]
    assert "# shared" in marks and any("@shared.down.weight" in line for line in lines)
    assert "# shared.down" not in marks
    assert all(a != b for a, b in zip(marks, marks[1:], strict=False))


def test_some_nodes_alone() -> None:
    graph = ProgramGraph(capture(layer(Spec()), (torch.randn(2, 5, 16),)).exported)
    sorts = [n for n in graph.nodes if "sort" in str(n.target)]
    assert print_graph(graph, sorts) in print_graph(graph) and print_graph(graph, sorts).count("\n") == 1
