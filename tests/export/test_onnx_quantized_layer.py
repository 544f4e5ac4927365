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

import dsmoe_compiler as dsmoe  # noqa: E402
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


@torch.no_grad()
def predicted(model: SeparateExperts, x: Tensor, up: LayerError, down: LayerError) -> float:
    """√E‖ŷ − y‖² over all tokens, when errors of weights are independent, as large as the relative ones say:
    each of a product's weights has the variance (relative_l2 · rms of the weights)².

        E‖ŷ − y‖² = ‖a‖² · width · var D + ‖x‖² var U · Σ of the squares of D's columns where h > 0
    """
    experts: list[Any] = list(model.experts)
    ups = torch.stack([expert.up.weight for expert in experts])
    downs = torch.stack([expert.down.weight for expert in experts])
    var_up, var_down = up.relative_l2**2 * ups.square().mean(), down.relative_l2**2 * downs.square().mean()
    weights, ids = model.gate(x).softmax(-1).topk(2)
    total = torch.zeros(())
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            h = ups[e] @ x[t]
            through = x[t].square().sum() * var_up * downs[e][:, h > 0].square().sum()
            total += weight**2 * (h.relu().square().sum() * len(x[t]) * var_down + through)
    return float(total.sqrt())


@pytest.fixture(scope="module")
def program() -> dsmoe.Program:
    return dsmoe.compile(layer(), (rows(),))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_layer_is_as_near_as_its_errors_say(
    tmp_path: Path, program: dsmoe.Program, weights: Weights
) -> None:
    model, x = layer(), rows()
    made = export_onnx(program, path=tmp_path / "layer.onnx", weights=weights, verify=False)
    errors = {error.name.rsplit("/", 1)[-1]: error for error in made.quantized}
    assert set(errors) == {"up", "down"} and {e.bits for e in errors.values()} == {int(weights[3:])}
    with torch.no_grad():
        apart = np.abs(run(made.path, x) - model(x).numpy())
    bound = allowed(model, x, errors["up"], errors["down"]).numpy()
    assert (apart <= bound + 1e-6).all()
    # The sum of many independent errors is near what is expected of it: the bound is far above.
    expected = predicted(model, x, errors["up"], errors["down"])
    assert expected / 1.5 <= np.linalg.norm(apart) <= 1.5 * expected


def run(path: Path, x: Tensor) -> Any:
    """By onnxruntime, its rows not rounded."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    return y
