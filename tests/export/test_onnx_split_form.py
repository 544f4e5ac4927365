"""Layers as sorted rows, a product an expert: the same numbers in onnxruntime and in onnx's own evaluator as
by the reference, whatever the body and the routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from dsmoe_compiler.export.onnx.carry import carry
from dsmoe_compiler.export.onnx.initializers import drop_unused
from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.export.onnx.lower import lower, plain
from dsmoe_compiler.export.onnx.routing import Routing
from dsmoe_compiler.export.onnx.split_form import NotSplit, split_form
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, to_text
from tests.export.onnx_contrib_layer import (
    SWIGLU,
    Array,
    D,
    E,
    F,
    K,
    Layer,
    Two,
    in_onnxruntime,
    in_reference,
    tokens,
)

_UP, _DOWN, _ONE = (E, 2 * F, D), (E, D, F), (E, F, D)
BODIES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "SwiGLU": (SWIGLU, [_UP, _DOWN]),
    "turned, interleaved": (
        "h=matmul(x,p0); mul(matmul(mul(silu(slice(h,0,12,2)),slice(h,1,12,2)),p1),w)",
        [(E, D, 2 * F), (E, F, D)],
    ),
    "separate": ("mul(linear(mul(gelu(linear(x,p0)),linear(x,p1)),p2),w)", [_ONE, _ONE, _DOWN]),
    "biases": ("mul(add(linear(relu(add(linear(x,p0),p1)),p2),p3),w)", [_ONE, (E, F), _DOWN, (E, D)]),
    "a number an expert": ("mul(mul(linear(silu(linear(x,p0)),p1),p2),w)", [_ONE, _DOWN, (E,)]),
    "weight on x": ("linear(silu(linear(mul(x,w),p0)),p1)", [_ONE, _DOWN]),
    "weight inside": ("linear(mul(silu(linear(x,p0)),w),p1)", [_ONE, _DOWN]),
    "no weight": ("linear(silu(linear(x,p0)),p1)", [_ONE, _DOWN]),
    "norm between": ("mul(linear(rms_norm(silu(linear(x,p0)),p1,1e-6),p2),w)", [_ONE, (E, F), _DOWN]),
    "clamped": ("mul(linear(clamp(linear(x,p0),-0.5,0.5),p1),w)", [_ONE, _DOWN]),
    "one product": ("mul(linear(x,p0),w)", [(E, D, D)]),
    "scaled twice": ("mul(mul(linear(relu(linear(x,p0)),p1),w),w)", [_ONE, _DOWN]),
}


def exported(
    module: nn.Module, args: Sequence[Tensor], *, drops: bool = False, opset: int = 20
) -> onnx.ModelProto:
    """The module as a model of standard operators; T is dynamic."""
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    program = torch.export.export(module, tuple(args), dynamic_shapes=shapes)
    names = dict[int, str]()

    def choose(layer: Experts) -> Form:
        names[layer.number] = f"layers.{layer.number}"
        routing = Routing(drops=drops, distinct=True, negative=False)
        return split_form(Experts(layer.number, "", layer.spec, routing, layer.slots, layer.params))

    model = carry(program, opset, {}, choose)
    lower(model, names, plain)
    model.ir_version = 10
    drop_unused(model.graph)
    NameFixPass()(model)
    proto: onnx.ModelProto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _close(actual: Array, expected: Tensor) -> None:
    # float32 sums of at most 12 products of numbers about 1, in two orders.
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BODIES)
def test_every_body(name: str) -> None:
    torch.manual_seed(0)
    body, shapes = BODIES[name]
    layer = Layer(body, shapes)
    model = exported(layer, tokens(6))
    ours, theirs = in_onnxruntime(model), in_reference(model)
    for count in (1, 2, 13):
        args = tokens(count)
        wanted = layer(*args).detach()
        _close(ours(args)[0], wanted)
        _close(theirs(args)[0], wanted)


@pytest.fixture(scope="module")
def swiglu() -> tuple[Layer, onnx.ModelProto]:
    torch.manual_seed(0)
    layer = Layer()
    return layer, exported(layer, tokens(6))


def test_any_routing(swiglu: tuple[Layer, onnx.ModelProto]) -> None:
    layer, model = swiglu
    run = in_onnxruntime(model)
    x, _, weights = tokens(9)
    routings = {
        "one expert takes all": torch.tensor([[3, 0]]).expand(9, 2),
        "only the last two": torch.tensor([[E - 2, E - 1]]).expand(9, 2),
        "in descending order": torch.arange(18).remainder(E).flip(0).view(9, 2),
        "the same expert twice": torch.tensor([[2, 2]]).expand(9, 2),
    }
    for ids in routings.values():
        wanted = layer(x, ids, weights).detach()
        _close(run((x, ids.contiguous(), weights))[0], wanted)
    none = tuple(t[:0] for t in (x, routings["one expert takes all"].contiguous(), weights))
    assert run(none)[0].shape == (0, D)


@pytest.mark.parametrize("slots", [1, E])
def test_one_slot_and_every_expert(slots: int) -> None:
    torch.manual_seed(0)
    layer = Layer()
    run = in_onnxruntime(exported(layer, tokens(4, slots)))
    for count in (1, 7):
        args = tokens(count, slots)
        _close(run(args)[0], layer(*args).detach())


@pytest.mark.parametrize("name", ["SwiGLU", "biases", "weight inside", "norm between"])
def test_dropped_pairs_add_nothing(name: str) -> None:
    torch.manual_seed(0)
    body, shapes = BODIES[name]
    layer = Layer(body, shapes)
    model = exported(layer, tokens(6), drops=True)
    ours, theirs = in_onnxruntime(model), in_reference(model)
    x, ids, weights = tokens(11)
    for dropped in (torch.rand(11, K) < 0.4, torch.zeros(11, K) > 0, torch.ones(11, K) > 0):
        # What a dropped pair weighs is not read, whatever it is.
        given = (x, ids.masked_fill(dropped, -1), weights.masked_fill(dropped, float("nan")))
        wanted = layer(*given).detach()
        assert wanted.isfinite().all()
        _close(ours(given)[0], wanted)
        _close(theirs(given)[0], wanted)


def test_the_same_answer_on_every_run(swiglu: tuple[Layer, onnx.ModelProto]) -> None:
    layer, model = swiglu
    args = tokens(64)
    wanted = layer(*args).detach()
    for threads in (2, 4):
        run = in_onnxruntime(model, threads)
        for _ in range(100):
            _close(run(args)[0], wanted)


def test_two_layers_one_after_the_other() -> None:
    torch.manual_seed(0)
    both = Two(Layer(), Layer())
    run = in_onnxruntime(exported(both, tokens(6)))
    for count in (1, 8):
        args = tokens(count)
        _close(run(args)[0], both(*args).detach())


def test_a_product_an_expert_and_no_operator_that_races(swiglu: tuple[Layer, onnx.ModelProto]) -> None:
    nodes = [node.op_type for node in swiglu[1].graph.node]
    assert nodes.count("MatMul") == 2 * E + 1  # and one that sums the slots
    assert not {"ScatterND", "ScatterElements", "Loop", "Scan", "If"} & set(nodes)
    assert len(nodes) <= 2 * E + 40
    assert {node.domain for node in swiglu[1].graph.node} == {""}


def test_a_matrix_that_is_computed_is_not_split() -> None:
    spec = ExpertsSpec(E, D, parse_body("mul(linear(relu(linear(x,mul(p0,2.0))),p1),w)"))
    params = (torch.empty(_ONE), torch.empty(_DOWN))
    layer = Experts(0, "", spec, Routing(drops=False, distinct=True, negative=False), K, params)
    with pytest.raises(NotSplit, match="a product's matrix is computed"):
        split_form(layer)


class _Packed(nn.Module):
    """Experts whose matrices are parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ParameterList([nn.Parameter(torch.randn(F, D)) for _ in range(E)])
        self.down = nn.ParameterList([nn.Parameter(torch.randn(F, D)) for _ in range(E)])
        self.spec = to_text(ExpertsSpec(E, D, parse_body("mul(matmul(relu(linear(x,p0)),p1),w)")))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        up, down = (ops.PACK(list(parts)) for parts in (self.up, self.down))
        out: Tensor = ops.EXPERTS(x_TD, ids_TK, weights_TK, [up, down], self.spec)
        return out


def test_separate_matrices_keep_their_names() -> None:
    torch.manual_seed(0)
    layer = _Packed()
    model = exported(layer, tokens(6))
    stored = {i.name: list(i.dims) for i in model.graph.initializer if i.name.startswith(("up", "down"))}
    assert stored == {
        f"{name}.{e}": dims for name, dims in (("up", [D, F]), ("down", [F, D])) for e in range(E)
    }
    args = tokens(5)
    _close(in_onnxruntime(model)(args)[0], layer(*args).detach())
