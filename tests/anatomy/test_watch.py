"""A layer's anatomy: its values and no others, each with its role, whatever was captured before."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dsmoe_compiler import api
from dsmoe_compiler.anatomy.watch import Anatomist
from dsmoe_compiler.models import zoo
from dsmoe_compiler.report.drawing.layer_graph import LayerGraph
from tests.passes.spellings import ROUTERS, Spec, layer
from tests.report.layers_to_draw import LAYERS, drawn, inspected


def role_of(graph: LayerGraph, operator: str) -> Sequence[str]:
    return [o.role for o in graph.operators if o.operator == operator]


def test_roles_of_a_sorted_layer() -> None:
    before = drawn("grouped").before
    for operator, role in {
        "topk": "router",
        "softmax": "router",
        "div": "router",
        "sort": "permutation",
        "histc": "permutation",
        "silu": "experts",
        "transformers.grouped_mm_fallback": "experts",
        "index_put": "combine",
        "add": "combine",
    }.items():
        found = role_of(before, operator)
        assert role in found, f"{operator} is {found}"
    assert {o.role for o in before.operators if any("shared" in p.name for p in o.parameters)} == {"shared"}


def test_roles_of_a_refused_layer() -> None:
    before = drawn("refused").before
    assert role_of(before, "topk") == ["router"] and set(role_of(before, "one_hot")) == {"permutation"}
    assert {o.role for o in before.operators if any("experts." in p.name for p in o.parameters)} == {
        "experts"
    }
    assert [o.operator for o in before.operators if o.lost] == ["cumsum"]


@pytest.mark.parametrize("name", LAYERS)
def test_the_text_tells_every_operator(name: str) -> None:
    before = drawn(name).before
    lines = "\n".join(before.text.splitlines())
    assert before.operators and all(operator.line in lines for operator in before.operators)
    known = {given.name for given in before.inputs}
    for operator in before.operators:
        assert known.issuperset(operator.reads), f"{operator.name} reads what the layer has not said"
        known.add(operator.name)


def test_layers_alike_have_the_same_text_but_for_their_name() -> None:
    anatomist = Anatomist()
    model, inputs = (
        zoo.build("deepseek-moe-tiny", device="meta"),
        zoo.example_inputs("deepseek-moe-tiny", "meta"),
    )
    report = api.inspect(model, (), dict(inputs), instruments=(anatomist,))
    first, second = (anatomist.layer(report, each.name) for each in report.layers)
    for a, b in ((first.before, second.before), (first.after, second.after)):
        assert a is not None and b is not None
        assert a.text.splitlines()[1:] == b.text.splitlines()[1:]
        assert a.text.splitlines()[0] != b.text.splitlines()[0]
    assert [given.name for given in first.before.inputs] == ["%x"]


@pytest.mark.parametrize("name", ["grouped", "few", "refused"])
def test_a_second_capture_has_the_same_anatomy(name: str) -> None:
    assert inspected(name) == drawn(name)


def test_a_router_left_as_written_is_part_of_what_became() -> None:
    unknown = next(route for route in ROUTERS if not route.fused)
    anatomist = Anatomist()
    report = api.inspect(layer(Spec(route=unknown)), (torch.randn(2, 3, 16),), instruments=(anatomist,))
    (found,) = report.layers
    assert found.spec is not None and found.spec.router is None
    after = anatomist.layer(report, found.name).after
    assert after is not None
    assert role_of(after, "topk") == ["router"] and "dsmoe.experts" in [o.operator for o in after.operators]


def test_a_layer_without_a_module_is_what_lies_around_where_it_ended() -> None:
    def model(x_TD: Tensor, gate_ED: Tensor, up_EDF: Tensor) -> Tensor:
        before = x_TD
        for _ in range(150):
            before = torch.tanh(before)
        weights_TK, ids_TK = (before @ gate_ED.T).softmax(-1).topk(2, dim=-1)
        rows = torch.einsum("td,tkdf->tkf", before, up_EDF[ids_TK]).cumsum(-1)
        after = (rows * weights_TK[..., None]).sum(1)
        for _ in range(150):
            after = torch.tanh(after)
        return after

    anatomist = Anatomist()
    given = (torch.randn(5, 8), torch.randn(4, 8), torch.randn(4, 8, 6))
    report = api.inspect(model, given, instruments=(anatomist,))
    (found,) = report.layers
    assert not found.name and not found.fused
    before = anatomist.layer(report, found.name).before
    assert 50 < len(before.operators) <= 120 and [o.lost for o in before.operators].count(True) == 1
    assert {"topk", "einsum", "cumsum", "sum"} <= {operator.operator for operator in before.operators}
    assert role_of(before, "einsum") == ["experts"] and role_of(before, "topk") == ["router"]
    assert before.inputs[0].type.startswith("f32[") and before.inputs[0].name == "%x"
