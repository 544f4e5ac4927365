"""What each pass does to one small layer, as text one can read: tests/golden/passes/."""

import re
from functools import cache
from inspect import getdoc

import pytest
import torch

from dsmoe_compiler.capture import capture
from dsmoe_compiler.ir.graph import ProgramGraph, erase_dead
from dsmoe_compiler.ir.passes import PassLog
from dsmoe_compiler.ir.printer import print_graph
from dsmoe_compiler.pipeline import DEFAULT
from tests.conftest import Golden
from tests.passes import loops, spellings
from tests.passes.spellings import ROUTERS, Sizes, Spec, layer

SMALL = Sizes(width=4, hidden=2, experts=3, top_k=2)
HALF = Sizes(width=8, hidden=8, experts=3, top_k=2)
LAYERS: dict[str, Spec | loops.Case] = {
    "half": Spec(sizes=HALF, shared="plain"),
    "grouped": Spec(sizes=SMALL, route=ROUTERS[2], shared="gated"),
    "gathered": Spec(
        spellings.gathered, body=spellings.BIASED, sizes=SMALL, route=ROUTERS[3], shared="plain"
    ),
    "dense": Spec(spellings.dense_repeat, sizes=SMALL, route=ROUTERS[5], transposed=True, shared="plain"),
    "loop": loops.Case(loops.from_shared),
}


def captured(spec: Spec | loops.Case) -> ProgramGraph:
    """The layer's graph; bfloat16 for the sizes that torch's own grouped product needs."""
    if isinstance(spec, loops.Case):
        return ProgramGraph(capture(loops.layer(spec), (torch.randn(2, 5, loops.D),)).exported)
    dtype = torch.bfloat16 if spec.sizes == HALF else torch.float32
    return ProgramGraph(
        capture(layer(spec, dtype), (torch.randn(2, 5, spec.sizes.width, dtype=dtype),)).exported
    )


@cache
def seen(name: str) -> dict[str, str]:
    """The stages of one of the layers."""
    return stages(LAYERS[name])


def stages(spec: Spec | loops.Case) -> dict[str, str]:
    """The graph before the first pass and after each one."""
    graph, log = captured(spec), PassLog()
    found = {"capture": print_graph(graph)}
    for step in DEFAULT:
        known = len(log.replacements)
        assert step.run(graph, log), f"{step.name} found nothing to do"
        erase_dead(graph.graph, [change.old for change in log.replacements[known:]])
        graph.graph.lint()
        found[step.name] = print_graph(graph)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_every_pass(name: str, golden: Golden) -> None:
    for i, (stage, text) in enumerate(seen(name).items()):
        golden(f"passes/{name}.{i}_{stage}", text)


def test_a_second_capture_prints_the_same_bytes() -> None:
    assert stages(LAYERS["grouped"]) == seen("grouped")


@pytest.mark.parametrize("step", DEFAULT, ids=lambda step: step.name)
def test_the_docstring_is_true(step: object) -> None:
    """Operators the docstring shows before are ones the pass takes away, those after are ones it leaves."""
    text = getdoc(type(step)) or ""
    parts = text.split("before:")[1].split("after:")
    before, after = (set(re.findall(r"(?:= |\()([a-z_.]+)\(", part)) for part in parts)
    texts = [seen(name) for name in LAYERS]
    names = list(texts[0])
    at = names.index(step.name)  # type: ignore[attr-defined]
    earlier = "".join(stage[names[at - 1]] for stage in texts)
    later = "".join(stage[names[at]] for stage in texts)
    for operator in before - after:
        assert f" {operator}(" in earlier, f"{operator} is not there before {names[at]}"
        assert later.count(f" {operator}(") < earlier.count(f" {operator}("), f"{operator} stays"
    for operator in after:
        assert f" {operator}(" in later, f"{operator} is not there after {names[at]}"


def test_a_pass_that_has_run_finds_nothing_more() -> None:
    graph = captured(LAYERS["grouped"])
    for step in DEFAULT:
        log = PassLog()
        step.run(graph, log)
        erase_dead(graph.graph)
        assert not step.run(graph, PassLog()), step.name
