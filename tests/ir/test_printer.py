"""Textual IR says the same of the same program however it was captured, and nothing of where it lay."""

import os
import re
import subprocess
import sys

import pytest
import torch

from dsmoe_compiler import pipeline
from dsmoe_compiler.capture import capture
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.printer import WIDTH, LayerNodes, print_graph, print_layer
from tests.passes import spellings
from tests.passes.spellings import Spec, layer
from tests.report.layers_to_draw import D, Loop


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


def whole_layer(graph: ProgramGraph) -> LayerNodes:
    """All of a captured layer that stands alone."""
    calls = tuple(node for node in graph.nodes if node.op == "call_function")
    return LayerNodes("", tuple(graph.user_inputs()), calls, tuple(graph.nodes[-1].all_input_nodes))


def test_a_fused_layer_takes_a_dozen_lines() -> None:
    graph = ProgramGraph(capture(layer(Spec(shared="gated")), (torch.randn(2, 5, 16),)).exported)
    pipeline.run(graph, pipeline.DEFAULT, "off")
    lines = print_layer(graph, whole_layer(graph)).splitlines()
    assert lines[:2] == ["# the whole model, T = s0*s1 tokens", "%x : f32[s0, s1, 16] = input"]
    assert lines[-1].startswith("return %") and len(lines) <= 15
    assert sum("dsmoe.moe" in line for line in lines) == 1 and all(len(line) <= WIDTH for line in lines)


def test_a_layer_says_sizes_where_they_are_used_and_counts_what_it_leaves_out() -> None:
    looped = Loop(3)
    graph = ProgramGraph(capture(looped, (torch.randn(2, 5, D),)).exported)
    printed = print_layer(graph, whole_layer(graph))
    assert "sym_size" not in printed and "assert" not in printed.replace("3 assertions not shown", "")
    assert "# 3 assertions not shown" in printed
    assert re.findall(r": \(i64\[(u\d)\]", printed) == ["u0", "u1", "u2"], (
        "sizes of the data keep their letter"
    )


def test_a_list_of_experts_is_one_short_line() -> None:
    graph = ProgramGraph(capture(Loop(8), (torch.randn(2, 5, D),)).exported)
    pipeline.run(graph, pipeline.DEFAULT, "off")
    packs = [line for line in print_graph(graph).splitlines() if "dsmoe.pack" in line]
    assert len(packs) == 3 and all("[@experts.{0..7}.w" in line and len(line) < WIDTH for line in packs)


TWICE = """
import sys, torch
from dsmoe_compiler import api
from dsmoe_compiler.anatomy.watch import Anatomist
from dsmoe_compiler.models import zoo
if sys.argv[1] == "1":
    api.inspect(torch.nn.Linear(4, 4), (torch.randn(3, 4),))
watch = Anatomist()
inputs = dict(zoo.example_inputs("deepseek-moe-tiny", "meta"))
report = api.inspect(zoo.build("deepseek-moe-tiny", device="meta"), (), inputs, instruments=(watch,))
sys.stdout.write("".join(watch.layer(report, layer.name).text for layer in report.layers))
"""


@pytest.mark.slow
def test_other_processes_print_the_same_bytes() -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, str(seed)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
        )
        for seed in (0, 1)
    ]
    first, second = (process.communicate()[0] for process in started)
    assert first == second and b"dsmoe.moe" in first
