"""Programs whose layers run by generated kernels, in Triton's interpreter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.spec import to_text
from dsmoe_compiler.runtime import generated
from tests.codegen.interpreted import interpreter
from tests.codegen.layers import Made, make
from tests.tiny_models import relative, tiny, tokens


@pytest.fixture
def in_interpreter() -> Iterator[None]:
    with interpreter():
        yield


def run(made: Made) -> Tensor:
    """The layer by its opaque operator."""
    text = to_text(made.spec)
    if made.router:
        return generated.MOE(made.x, made.router, made.params, made.shared, text)  # type: ignore[no-any-return]
    return generated.EXPERTS(made.x, made.ids, made.weights, made.params, text)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("in_interpreter")
def test_a_whole_model() -> None:
    model = tiny()
    program = dsmoe.compile(model, (tokens(2, 3),), backend="triton", require_fused=True)
    assert program.report.backend == "triton"
    with torch.no_grad():
        for size in ((1, 1), (3, 11), (0, 2)):
            ids = tokens(*size)
            assert relative(program(ids), model(ids)) < 1e-5


@pytest.mark.usefixtures("in_interpreter")
@pytest.mark.parametrize("kind", ["experts", "routed", "routed and shared", "gated shared"])
def test_the_operator_equals_the_reference(kind: str) -> None:
    shared = {"routed and shared": "plain", "gated shared": "gated"}.get(kind, "")
    for count in (0, 1, 30):
        made = make(router="" if kind == "experts" else "softmax", shared=shared, tokens=count)
        want = made.operator()
        got = run(made)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert relative(got, want) < 1e-5


@pytest.mark.usefixtures("in_interpreter")
def test_rows_that_are_not_contiguous() -> None:
    made = make(load="dropped", tokens=9)
    wide = torch.zeros(9, 2 * made.x.shape[1])
    wide[:, ::2] = made.x
    text = to_text(made.spec)
    got = generated.EXPERTS(wide[:, ::2], made.ids.t().contiguous().t(), made.weights, made.params, text)
    assert relative(got, made.operator()) < 1e-5


@pytest.mark.usefixtures("in_interpreter")
def test_ids_without_a_sign() -> None:
    made = make(experts=256, tokens=9, sizes=(8, 8))
    got = generated.EXPERTS(made.x, made.ids.to(torch.uint8), made.weights, made.params, to_text(made.spec))
    assert relative(got, made.operator()) < 1e-5


@pytest.mark.usefixtures("in_interpreter")
@pytest.mark.parametrize(
    ("body", "because"),
    [
        ("mul(linear(softmax(linear(x,p0)),p1),w)", "`softmax` joins the numbers of a row"),
        ("mul(add(linear(relu(linear(x,p0)),p1),x),w)", "it reads x beside its products"),
        ("mul(linear(atan(linear(x,p0)),p1),w)", "`atan`"),
    ],
)
def test_what_has_no_kernels_runs_by_the_reference_and_says_so_once(body: str, because: str) -> None:
    from dsmoe_compiler.ir.body import parse_body
    from dsmoe_compiler.ir.spec import ExpertsSpec

    x, ids, weights = torch.randn(3, 8), torch.tensor([[0], [1], [-1]]), torch.rand(3, 1)
    params = [torch.randn(2, 12, 8), torch.randn(2, 8, 12)]
    text = to_text(ExpertsSpec(2, 8, parse_body(body)))
    with pytest.warns(UserWarning, match="runs by the reference") as said:
        first = generated.EXPERTS(x, ids, weights, params, text)
    assert len(said) == 1 and because in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generated.EXPERTS(x, ids, weights, params, text).equal(first)
    assert first.equal(ops.EXPERTS(x, ids, weights, params, text))


@pytest.mark.usefixtures("in_interpreter")
def test_a_dtype_without_kernels() -> None:
    made = make(tokens=3)
    params = [p.double() for p in made.params]
    text = to_text(made.spec)
    with pytest.warns(UserWarning, match="float64"):
        got = generated.EXPERTS(made.x.double(), made.ids, made.weights.double(), params, text)
    assert relative(got, made.expected()) < 1e-12


@pytest.mark.usefixtures("in_interpreter")
def test_gradients_flow_through_the_reference() -> None:
    made = make(tokens=3)
    module = generated.GeneratedExperts(to_text(made.spec))
    x = made.x.clone().requires_grad_()
    module(x, made.ids, made.weights, made.params).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.usefixtures("in_interpreter")
def test_torch_compile_sees_one_opaque_operator() -> None:
    made = make(tokens=5)
    module = generated.GeneratedExperts(to_text(made.spec))
    seen = list[str]()

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch.no_grad():
        got = compiled(made.x, made.ids, made.weights, made.params)
    assert relative(got, made.operator()) < 1e-5
    assert seen == ["dsmoe.generated_experts.default"]


def test_a_cpu_model_needs_the_interpreter() -> None:
    with pytest.raises(dsmoe.InputError, match="TRITON_INTERPRET=1") as caught:
        dsmoe.compile(nn.Linear(4, 4), (torch.ones(2, 4),), backend="triton")
    assert "\n" not in str(caught.value)


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(dsmoe.InputError, match=r"dsmoe-compiler\[triton\]"):
        dsmoe.compile(nn.Linear(4, 4), (torch.ones(2, 4),), backend="triton")
