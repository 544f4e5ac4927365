"""Layers as onnxruntime's `com.microsoft::MoE`: the same numbers by its kernel, by onnx's own evaluator, and
inlined.
"""

from __future__ import annotations

import pytest
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import numpy as np

from tests.export.onnx_contrib_layer import (
    SHAPES,
    SWIGLU,
    D,
    E,
    F,
    Layer,
    exported_to_ort,
    in_onnxruntime,
    in_reference,
    inlined,
    tokens,
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


class Beside(nn.Module):
    """Layers that read the same, an output each."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x_TD, ids_TK, weights_TK) for layer in self.layers)


@pytest.mark.parametrize("names", [["gate;up"], ["relu", "no weight"], ["clamped, biases"], list(BODIES)])
def test_bodies_by_the_kernel_and_by_the_function(names: list[str]) -> None:
    module = Beside([Layer(*BODIES[name]) for name in names])
    model = exported_to_ort(module, tokens(7))
    assert [n.op_type for n in model.graph.node if n.domain] == ["MoE"] * len(names)
    ways = [in_onnxruntime(model), in_reference(model), in_onnxruntime(inlined(model))]
    for count in (0, 1, 7, 33):
        args = tokens(count)
        for way in ways:
            for name, found, expected in zip(names, way(args), module(*args), strict=True):
                assert count < 7 or (expected - 0.25).abs().max() > 0.3
                np.testing.assert_allclose(found, expected.detach(), atol=2e-6, err_msg=name)
