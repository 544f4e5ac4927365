"""Layers as onnxruntime's `com.microsoft::MoE`: the same numbers by its kernel, by onnx's own evaluator, and
inlined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import numpy as np
import onnx
from onnx import helper

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, to_text
from tests.export.onnx_contrib_layer import (
    KNOWN,
    SHAPES,
    SWIGLU,
    D,
    E,
    F,
    K,
    Layer,
    Run,
    Two,
    exported_to_ort,
    in_onnxruntime,
    in_reference,
    inlined,
    tokens,
    why_not,
)

_UP, _DOWN = SHAPES["up"], SHAPES["down"]
_ONE = (E, F, D)
_TURNED: list[tuple[int, ...]] = [(E, D, 2 * F), (E, F, D)]
_CLAMPED = (
    "h=add(matmul(x,p0),p1); g=clamp(slice(h,0,12,2),None,0.7);"
    " mul(add(matmul(mul(add(clamp(slice(h,1,12,2),-0.7,0.7),1),mul(g,sigmoid(mul(g,1.702)))),p2),p3),w)"
)
BODIES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "gate;up": (SWIGLU, [_UP, _DOWN]),
    "up;gate": ("h=linear(x,p0); mul(linear(mul(silu(slice(h,6,12,1)),slice(h,0,6,1)),p1),w)", [_UP, _DOWN]),
    "interleaved": (
        "h=linear(x,p0); mul(linear(mul(silu(slice(h,0,12,2)),slice(h,1,12,2)),p1),w)",
        [_UP, _DOWN],
    ),
    "separate": ("mul(linear(mul(silu(linear(x,p0)),linear(x,p1)),p2),w)", [_ONE, _ONE, _DOWN]),
    "turned": ("h=matmul(x,p0); mul(matmul(mul(silu(slice(h,0,6,1)),slice(h,6,12,1)),p1),w)", _TURNED),
    "spelled out": (
        "h=linear(x,p0); mul(linear(mul(mul(h,sigmoid(h)),linear(x,p1)),p2),w)",
        [_ONE, _ONE, _DOWN],
    ),
    "clamped, biases": (_CLAMPED, [(E, D, 2 * F), (E, 2 * F), (E, F, D), (E, D)]),
    "relu": ("mul(linear(relu(linear(x,p0)),p1),w)", [_ONE, _DOWN]),
    "silu": ("mul(linear(silu(add(linear(x,p0),p1)),p2),w)", [_ONE, (E, F), _DOWN]),
    "identity": ("mul(add(linear(linear(x,p0),p1),p2),w)", [_ONE, _DOWN, (E, D)]),
    "no weight": ("linear(relu(linear(x,p0)),p1)", [_ONE, _DOWN]),
    "casts": (
        "mul(linear(cast(relu(linear(cast(x,float32),p0)),float32),p1),cast(w,float32))",
        [_ONE, _DOWN],
    ),
}


ON_X = {"x times the weight": ("linear(relu(linear(mul(x,w),p0)),p1)", [_ONE, _DOWN])}


class Beside(nn.Module):
    """Layers that read the same, an output each."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x_TD, ids_TK, weights_TK) for layer in self.layers)


def _compare(model: onnx.ModelProto, module: nn.Module, *given: tuple[Tensor, ...]) -> None:
    """The kernel, the function in onnx's evaluator and the function inlined give what the module gives."""
    _compare_ways(
        [in_onnxruntime(model), in_reference(model), in_onnxruntime(inlined(model))], module, *given
    )


def _compare_ways(ways: list[Run], module: nn.Module, *given: tuple[Tensor, ...]) -> None:
    for args in given:
        expected = module(*args)
        for way in ways:
            found = way(args)
            for one, other in zip(
                found, [expected] if isinstance(expected, Tensor) else expected, strict=True
            ):
                np.testing.assert_allclose(one, other.detach(), rtol=2e-6, atol=2e-6)


def _nodes(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.domain]


@pytest.fixture(scope="module")
def single() -> tuple[Layer, onnx.ModelProto]:
    torch.manual_seed(0)
    layer = Layer()
    return layer, exported_to_ort(layer, tokens(7))


def test_a_layer_by_the_kernel_and_by_the_function(single: tuple[Layer, onnx.ModelProto]) -> None:
    layer, model = single
    _compare(model, layer, tokens(33), tokens(7), tokens(1), tokens(0))


def test_bodies_of_every_kind_in_one_model() -> None:
    module = Beside([Layer(*body) for body in BODIES.values()])
    model = exported_to_ort(module, tokens(7))
    assert _nodes(model) == ["MoE"] * len(BODIES)
    args = tokens(33)
    assert min((out - 0.25).abs().max() for out in module(*args)) > 0.3
    _compare(model, module, args, tokens(7), tokens(1), tokens(0))


def test_weights_and_ids_that_are_easily_lost() -> None:
    layer = Layer(*BODIES["clamped, biases"])
    model = exported_to_ort(layer, tokens(7), replace(KNOWN, drops=True))
    x, ids, weights = tokens(8)
    dropped, nothing = ids.clone(), weights.clone()
    dropped[0, 0] = dropped[1, 1] = dropped[2] = -1  # a token whose every slot is dropped is 0
    nothing[0, 0], nothing[1], nothing[2] = 0, 0, 1e-38  # so is one whose weights are
    nothing[3], nothing[4, 0], nothing[5] = 1e30, 1e-20, 0.5  # equal weights are a tie
    last = torch.tensor([[E - 2, E - 1]] * 8)
    _compare(
        model, layer, (x, dropped, weights), (x, ids, nothing), (x, dropped, nothing), (x, last, weights)
    )
    (found,) = in_onnxruntime(model)((x, dropped, weights))
    assert (found[2] == 0.25).all()


def test_one_slot_weighs_by_any_number() -> None:
    bodies = ("gate;up", "x times the weight", "no weight")
    module = Beside([Layer(*(BODIES | ON_X)[name]) for name in bodies])
    routing = replace(KNOWN, drops=True, negative=True)
    model = exported_to_ort(module, tokens(7, slots=1), routing)
    x, ids, weights = tokens(6, slots=1)
    weights[0], weights[1], weights[2], ids[3] = -2.0, 0.0, 1e-38, -1
    _compare(model, module, (x, ids, weights), tokens(1, slots=1), tokens(0, slots=1))


def test_every_expert_chosen() -> None:
    layer = Layer(*BODIES["relu"])
    x, ids, weights = tokens(7, slots=E)
    weights[3] = 0  # no logit is left that another could be far below
    _compare(exported_to_ort(layer, tokens(7, slots=E)), layer, (x, ids, weights), tokens(1, slots=E))


def test_layers_one_after_the_other_on_several_threads() -> None:
    module = Two(Layer(), Layer(*BODIES["separate"]))
    model = exported_to_ort(module, tokens(7))
    assert _nodes(model) == ["MoE", "MoE"]
    args = tokens(64)
    expected = module(*args).detach()
    for threads in (2, 4):
        run = in_onnxruntime(model, threads)
        for _ in range(100):
            np.testing.assert_allclose(run(args)[0], expected, atol=2e-5)


class Tied(nn.Module):
    """One layer twice, and one whose matrices the model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        once = self.layer(self.layer(x_TD, ids_TK, weights_TK), ids_TK, weights_TK)
        params = [p * x_TD.sum().tanh() for p in self.layer.params]
        out: Tensor = ops.EXPERTS(once, ids_TK, weights_TK, params, to_text(self.layer.spec))
        return out


def test_a_layers_weights_are_written_once_and_read_when_they_are() -> None:
    module = Tied()
    model = exported_to_ort(module, tokens(7))
    large = [t.name for t in model.graph.initializer if np.prod(t.dims) >= E * D * F]
    assert [n for n in large if "fc" in n] == ["layers.0.fc1", "layers.0.fc2"]
    assert _nodes(model) == ["MoE"] * 3
    _compare(model, module, tokens(9))


# What onnxruntime gets wrong, or has no kernel for, is not what layers are written as.
def test_nodes_ask_for_what_the_kernel_does_right(single: tuple[Layer, onnx.ModelProto]) -> None:
    _, model = single
    (node,) = (n for n in model.graph.node if n.domain)
    asked = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    # Without normalisation, zeros come out between two other nodes; other fusions and the mixer fail.
    assert asked["normalize_routing_weights"] == asked["swiglu_fusion"] == 1
    assert asked["use_sparse_mixer"] == 0 and asked["activation_type"] == b"swiglu"
    assert len(node.input) <= 6  # no fc3
    assert node.input[0] in {output for other in model.graph.node for output in other.output}
    assert node.output[0] in {name for other in model.graph.node for name in other.input}
    (function,) = model.functions
    # `onnx.reference` takes no attribute by its default.
    assert {a.name for a in function.attribute_proto} == set(asked)


@pytest.mark.parametrize(
    ("body", "shapes", "why"),
    [
        ("mul(linear(gelu(linear(x,p0)),p1),w)", [_ONE, _DOWN], "no kernel for its activation"),
        (
            "mul(linear(mul(silu(linear(x,p0)),silu(linear(x,p0))),p1),w)",
            [_ONE, _DOWN],
            "no kernel for its act",
        ),
        ("mul(linear(mul(gelu(linear(x,p0)),linear(x,p1)),p2),w)", [_ONE, _ONE, _DOWN], "for its gating"),
        (
            "mul(linear(mul(silu(linear(x,p0)),relu(linear(x,p1))),p2),w)",
            [_ONE, _ONE, _DOWN],
            "for its gating",
        ),
        (
            "mul(linear(mul(silu(add(linear(x,p0),p1)),linear(x,p2)),p3),w)",
            [_ONE, (E, F), _ONE, _DOWN],
            "bias",
        ),
        (_CLAMPED.replace("None,0.7", "-0.7,0.7"), BODIES["clamped, biases"][1], "one limit"),
        (_CLAMPED.replace("None,0.7", "None,0.8"), BODIES["clamped, biases"][1], "one limit"),
        ("mul(linear(mul(relu(linear(x,p0)),w),p1),w)", [_ONE, _DOWN], "the routing weight"),
        ("mul(mul(linear(relu(linear(x,p0)),p1),w),w)", [_ONE, _DOWN], "the routing weight"),
        ("mul(tanh(linear(relu(linear(x,p0)),p1)),w)", [_ONE, _DOWN], "its output is more"),
        ("mul(linear(cast(relu(linear(x,p0)),bfloat16),p1),w)", [_ONE, _DOWN], "casts to bfloat16"),
        ("mul(linear(relu(linear(x,p0)),p1),w)", [_ONE, (E, D + 1, F)], "as wide as its input"),
        ("mul(linear(x,p0),w)", [(E, D, D)], "one product only"),
    ],
)
def test_bodies_without_a_kernel(body: str, shapes: list[tuple[int, ...]], why: str) -> None:
    assert why in why_not(Layer(body, shapes))


def test_routing_that_cannot_be_told_to_a_kernel() -> None:
    assert "negative" in why_not(Layer(), routing=replace(KNOWN, negative=True))
    assert "the same one twice" in why_not(Layer(), routing=replace(KNOWN, distinct=False))
    assert "multiplies x" in why_not(Layer(*ON_X["x times the weight"]))
    assert "float16" in why_not(Layer().half())
    assert "blocks of 32" in why_not(Layer(), weights="int8")


_ROUTERS = {
    "mixtral": RouterSpec(K, "softmax", renormalize=True, logits_dtype="float32"),
    "qwen2_moe": RouterSpec(K, "softmax", score_dtype="float32"),
    "deepseek_v3": RouterSpec(
        K,
        "sigmoid",
        renormalize=True,
        epsilon=1e-20,
        scale=2.5,
        selection_bias=True,
        groups=2,
        top_groups=1,
        group_score="top2",
        logits_dtype="float32",
    ),
    "gpt_oss": RouterSpec(K, "softmax", select="logits", logits_bias=True),
}


class Whole(nn.Module):
    """Layers with their routers, an output each."""

    def __init__(self, routers: list[RouterSpec]) -> None:
        super().__init__()
        experts = ExpertsSpec(8, D, parse_body(SWIGLU))
        self.specs = [MoESpec(K, experts, router) for router in routers]
        self.params = nn.ParameterList([nn.Parameter(torch.randn(8, *s[1:])) for s in (_UP, _DOWN)])
        self.router = nn.Parameter(torch.randn(8, D))
        self.bias = nn.Parameter(torch.randn(8) * 0.1)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            ops.MOE(
                x_TD,
                [self.router]
                + [self.bias] * (s.router is not None and (s.router.logits_bias + s.router.selection_bias)),
                list(self.params),
                [],
                to_text(s),
            )
            for s in self.specs
        )


def test_whole_layers_are_few_nodes() -> None:
    module = Whole(list(_ROUTERS.values()))
    x_TD = torch.randn(7, D)
    model = exported_to_ort(module, (x_TD,), routing=None)
    assert _nodes(model) == ["MoE"] * len(_ROUTERS)
    # onnx's own evaluator gathers only where the sizes are the same.
    _compare_ways([in_onnxruntime(model), in_onnxruntime(inlined(model))], module, (x_TD,), (x_TD[:1],))
    made = {output: node for node in model.graph.node for output in node.output}
    for name, output in zip(_ROUTERS, model.graph.output, strict=True):
        assert len(_above(made, output.name)) <= 40, name


def _above(made: Mapping[str, onnx.NodeProto], value: str) -> set[str]:
    """The nodes that a value is computed by, by their first outputs."""
    found, stack = set[str](), [value]
    while stack:
        node = made.get(stack.pop())
        if node is not None and node.output[0] not in found:
            found.add(node.output[0])
            stack.extend(node.input)
    return found
