"""A whole layer with quantised experts, against itself unquantised: no further than its errors allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from dsmoe_compiler.export.onnx.quantized_matrix import LayerError, Weights  # noqa: E402
from dsmoe_compiler.exports import export_onnx  # noqa: E402
from tests.tiny_models import SeparateExperts  # noqa: E402

TOKENS = 11


def layer() -> SeparateExperts:
    torch.manual_seed(0)
    return SeparateExperts().eval()


def rows() -> Tensor:
    return torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def allowed(model: SeparateExperts, x: Tensor, up: LayerError, down: LayerError) -> Tensor:
    """How far each token's output may be off, (T, 1), when no weight is off by more than the errors say.

    With h = x·U, a = relu(h), y = a·D and weights Û, D̂:
        |ĥ − h| ≤ Σ|x| max|Û − U|,  |â − a| ≤ |ĥ − h|,
        |ŷ − y| ≤ Σ|a| max|D̂ − D| + Σ|â − a| max|D̂|
    """
    weights, ids = model.gate(x).softmax(-1).topk(2)
    bound = torch.zeros(x.shape[0], 1)
    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t], ids[t].tolist(), strict=True):
            module: Any = model.experts[expert]
            a = module.up(x[t]).relu()
            apart = len(a) * x[t].abs().sum() * up.largest
            largest = module.down.weight.abs().max() + down.largest
            bound[t] += weight * (a.abs().sum() * down.largest + apart * largest)
    return bound


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_layer_is_as_near_as_its_errors_say(tmp_path: Path, weights: Weights) -> None:
    model, x = layer(), rows()
    made = export_onnx(model, (x,), path=tmp_path / "layer.onnx", weights=weights, verify=False)
    errors = {error.name.rsplit("/", 1)[-1]: error for error in made.quantized}
    assert set(errors) == {"up", "down"} and {e.bits for e in errors.values()} == {int(weights[3:])}
    with torch.no_grad():
        expected = model(x).numpy()
    bound = allowed(model, x, errors["up"], errors["down"]).numpy() + 1e-6
    y = run(made.path, x)
    assert (np.abs(y - expected) <= bound).all()
    assert not np.allclose(y, expected, rtol=1e-6, atol=1e-6)  # these are other weights


def run(path: Path, x: Tensor) -> Any:
    """By onnxruntime, its rows not rounded."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    return y
