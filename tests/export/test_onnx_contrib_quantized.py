"""Layers as onnxruntime's `com.microsoft::QMoE`, in 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import numpy as np
import onnx

from dsmoe_compiler.export.onnx.contrib_exact import without_kernels
from dsmoe_compiler.export.onnx.contrib_quantized import packed
from dsmoe_compiler.export.onnx.quantize import dequantize, quantize
from dsmoe_compiler.export.onnx.quantized_matrix import Weights, form_of
from dsmoe_compiler.ir.errors import ExportError
from dsmoe_compiler.onnx_check import _check_kernels
from tests.export.onnx_contrib_layer import (
    E,
    Layer,
    Two,
    exported_to_ort,
    in_onnxruntime,
    in_reference,
    tokens,
)

WIDE, HIDDEN = 64, 96
_BIASED = (
    "h=add(linear(x,p0),p1); mul(add(linear(mul(silu(slice(h,0,96,1)),slice(h,96,192,1)),p2),p3),w)",
    [(E, 2 * HIDDEN, WIDE), (E, 2 * HIDDEN), (E, WIDE, HIDDEN), (E, WIDE)],
)
_SEPARATE = (
    "mul(matmul(mul(silu(linear(x,p0)),linear(x,p1)),p2),w)",
    [(E, HIDDEN, WIDE), (E, HIDDEN, WIDE), (E, HIDDEN, WIDE)],
)


def _rounded(layer: Layer, weights: Weights) -> None:
    """Make the layer's matrices the numbers that they are written as."""
    text = str(layer.spec.body)
    for i, param in enumerate(layer.params):
        for e in range(E if param.dim() == 3 else 0):
            turned = f"matmul(mul(silu(linear(x,p0)),linear(x,p1)),p{i})" in text
            matrix = param.data[e].numpy() if turned else param.data[e].numpy().T
            made = torch.from_numpy(dequantize(quantize(matrix, form_of(weights))))
            param.data[e] = made if turned else made.T


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_kernel_and_the_function_multiply_by_the_rounded_weights(
    weights: Weights, tmp_path: Path
) -> None:
    layers = [Layer(*body, hidden=WIDE) for body in (_BIASED, _SEPARATE)]
    for layer in layers:
        for param in layer.params:
            param.data *= 0.2
    module = Two(*layers)
    model = exported_to_ort(module, tokens(7, width=WIDE), weights=weights)
    nodes = [node for node in model.graph.node if node.domain]
    assert [node.op_type for node in nodes] == ["QMoE", "QMoE"]
    saved = onnx.ModelProto.FromString(model.SerializeToString())  # saving changes what is saved
    onnx.save(saved, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64)
    if weights == "int4":
        _check_two_codes_are_a_byte(model)
    for layer in layers:
        _rounded(layer, weights)
    with without_kernels(tmp_path / "m.onnx") as exact_path:
        beside = in_onnxruntime(onnx.load(exact_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.data", "m.onnx"]
    for count in (0, 1, 7, 33):
        args = tokens(count, width=WIDE)
        expected = module(*args).detach().numpy()
        for exact in (in_reference(model), beside):
            np.testing.assert_allclose(exact(args)[0], expected, atol=5e-6)
        (found,) = in_onnxruntime(model)(args)
        assert found.shape == expected.shape
        # The kernel rounds rows to 8 bits, too.
        assert np.linalg.norm(found - expected) <= 0.01 * np.linalg.norm(expected)


def _check_two_codes_are_a_byte(model: onnx.ModelProto) -> None:
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer if ".fc" in t.name}
    assert {name: size for name, size in sizes.items() if name.startswith("layers.1")} == {
        "layers.1.fc1.quantized": (E, 2 * HIDDEN, WIDE // 2),
        "layers.1.fc1.scale": (E, 2 * HIDDEN, WIDE // 32),
        "layers.1.fc1.zero_point": (E, 2 * HIDDEN, 1),
        "layers.1.fc2.quantized": (E, WIDE, HIDDEN // 2),
        "layers.1.fc2.scale": (E, WIDE, HIDDEN // 32),
        "layers.1.fc2.zero_point": (E, WIDE, 2),
    }


def test_a_kernel_that_computes_something_else_is_found(tmp_path: Path) -> None:
    layer = Layer(*_SEPARATE, hidden=WIDE)
    model = exported_to_ort(layer, tokens(7, width=WIDE), weights="int8")
    right, wrong = tmp_path / "right.onnx", tmp_path / "wrong.onnx"
    onnx.save(model, right)
    for node in model.graph.node:
        if node.op_type == "QMoE":
            (slots,) = (attribute for attribute in node.attribute if attribute.name == "k")
            slots.i = 1
    onnx.save(model, wrong)
    program: Any = SimpleNamespace(inputs=SimpleNamespace(flat=lambda args, kwargs: args))
    call: Any = (tokens(7, width=WIDE), {})
    with without_kernels(right) as exact:
        _check_kernels(program, right, exact, call)
        with pytest.raises(ExportError, match="quantised experts"):
            _check_kernels(program, wrong, exact, call)


def test_the_first_of_two_codes_is_low() -> None:
    assert packed(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert packed(np.array([[1, 255]], np.uint8), 8).tolist() == [[1, 255]]
