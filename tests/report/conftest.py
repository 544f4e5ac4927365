"""Specs of published models, and reports made of them."""

import pytest

from dsmoe_compiler.ir.body import Body, parse_body
from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from dsmoe_compiler.report.report import LayerReport, PassReport, Report

SHARED = parse_body("linear(mul(silu(linear(x,p0)),linear(x,p1)),p2)")


def swiglu(hidden: int) -> Body:
    """Stacked [gate;up], the routing weight on the output."""
    gate, up = f"slice(h,0,{hidden},1)", f"slice(h,{hidden},{2 * hidden},1)"
    return parse_body(f"h=linear(x,p0); mul(linear(mul(silu({gate}),{up}),p1),w)")


@pytest.fixture
def deepseek_moe_145b() -> MoESpec:
    experts = ExpertsSpec(128, 4096, swiglu(1408))
    return MoESpec(12, experts, RouterSpec(12, "softmax"), SharedSpec(SHARED, 5632))


@pytest.fixture
def deepseek_v3() -> MoESpec:
    router = RouterSpec(
        8,
        "sigmoid",
        selection_bias=True,
        groups=8,
        top_groups=4,
        group_score="top2",
        renormalize=True,
        scale=2.5,
    )
    return MoESpec(8, ExpertsSpec(256, 7168, swiglu(2048)), router, SharedSpec(SHARED, 2048))


@pytest.fixture
def router_as_written() -> MoESpec:
    return MoESpec(2, ExpertsSpec(8, 4096, swiglu(14336)))


@pytest.fixture
def refusal() -> Refusal:
    because = "the ids within one token are not known to be distinct, so a scatter may lose a weight"
    return Refusal("R404", because, "scatter_3", "my_model.py:123")


@pytest.fixture
def passes() -> tuple[PassReport, ...]:
    return (
        PassReport("normalize", 0.0123, 4102, 3980, True, None),
        PassReport("lift_experts", 0.1234, 3980, 2000, True, 2.34e-7),
        PassReport("lower", 0.0004, 2000, 2000, False, None),
    )


@pytest.fixture
def big(deepseek_moe_145b: MoESpec, passes: tuple[PassReport, ...]) -> Report:
    """61 layers, all fused, all alike."""
    layers = (
        LayerReport(f"model.layers.{i}.mlp", "gather", True, deepseek_moe_145b, None, "experts.py:60")
        for i in range(1, 62)
    )
    return Report("DeepSeekMoEForCausalLM", "export", tuple(layers), passes, program_error=3e-7)


@pytest.fixture
def mixed(deepseek_v3: MoESpec, router_as_written: MoESpec, refusal: Refusal) -> Report:
    """Four layers: two alike, a refused one, one whose router stayed."""
    layers = (
        LayerReport("layers.0.mlp", "grouped_mm", True, deepseek_v3, None, "a.py:1"),
        LayerReport("layers.1.mlp", "grouped_mm", True, deepseek_v3, None, "a.py:1", ("slow",)),
        LayerReport("layers.2.mlp", "dense", False, None, refusal, "b.py:2", ("slow",)),
        LayerReport("layers.3.mlp", "grouped_mm", True, router_as_written, None, "a.py:1"),
    )
    return Report("Mixed", "export", layers, (), "cpu", remarks=("a remark",))
