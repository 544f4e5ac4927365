"""Whole models as ONNX: eager's numbers on any batch, and a layer's nodes as few as its form needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

import dsmoe_compiler as dsmoe
from dsmoe_compiler.exports import Target
from dsmoe_compiler.models.zoo import build
from tests.transformers_models import VOCABULARY, family

EXPERTS = 8
# GShard's gate alone, as written, is some fifty nodes: two queues for each expert's places.
_BEYOND = {"gshard-tiny": 29}
SIZES = ((1, 1), (1, 17), (1, 128), (5, 9))


def _plain(*size: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, size)}


def _without_cache(*size: int) -> dict[str, Any]:
    return _plain(*size) | {"use_cache": False}


def _both_sides(*size: int) -> dict[str, Any]:
    """Of an encoder and a decoder."""
    mask = torch.ones(size, dtype=torch.int64)
    decoder = {"decoder_input_ids": torch.randint(3, VOCABULARY, size), "decoder_attention_mask": mask}
    return _without_cache(*size) | {"attention_mask": mask} | decoder


def _deepseek_v3(renormalised: bool) -> nn.Module:
    model = family("deepseek_v3")
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = renormalised  # type: ignore[assignment]
    return model


def _switch() -> nn.Module:
    package = "transformers.models.switch_transformers"
    config = importlib.import_module(f"{package}.configuration_switch_transformers")
    modeling = importlib.import_module(f"{package}.modeling_switch_transformers")
    torch.manual_seed(0)
    model: nn.Module = modeling.SwitchTransformersForConditionalGeneration(
        config.SwitchTransformersConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2,
            num_experts=EXPERTS,
            expert_capacity=4,
            dropout_rate=0.0,
            pad_token_id=0,
            decoder_start_token_id=1,
        )
    ).eval()
    for parameter in model.parameters():  # a trained router is not flat
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.125)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Any]]]] = {
    **{
        name: (lambda name=name: family(name), _without_cache)  # type: ignore[misc]
        for name in ("mixtral", "qwen2_moe", "gpt_oss", "granitemoe")
    },
    "deepseek_v3, renormalised": (lambda: _deepseek_v3(True), _without_cache),
    "deepseek_v3, as they are": (lambda: _deepseek_v3(False), _without_cache),
    "switch_transformers": (_switch, _both_sides),
    "gshard-tiny": (lambda: build("gshard-tiny"), _plain),
    "deepseek-moe-tiny": (lambda: build("deepseek-moe-tiny"), _plain),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["standard", "ort"])
@pytest.mark.parametrize("name", MODELS)
def test_any_batch(name: str, target: Target, tmp_path: Path) -> None:
    make, call = MODELS[name]
    model = make()
    torch.manual_seed(1)
    program = dsmoe.compile(model, (), call(3, 12), require_fused=True)
    exported = dsmoe.export_onnx(program, (), call(3, 12), path=tmp_path / "m.onnx", target=target)
    experts = {layer.name: layer.spec.experts.count for layer in program.report.layers if layer.spec}
    assert [layer.name for layer in exported.layers] == list(experts)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    evaluator = ReferenceEvaluator(str(exported.path)) if target == "standard" else None
    for size in SIZES:
        given = call(*size)
        with torch.no_grad():
            expected = _logits(model(**given))
        feeds = {i.name: given[i.name].numpy() for i in session.get_inputs()}
        first = session.get_outputs()[0].name
        _close(session.run([first], feeds)[0], expected, 2e-5)
        if evaluator is not None and size != (1, 128):  # which it takes long for
            _close(next(iter(evaluator.run([first], feeds))), expected, 1e-5)
    graph = onnx.load(exported.path, load_external_data=False).graph
    for layer in exported.layers:
        count = sum(node.name.startswith(f"{layer.name}/") for node in graph.node)
        count += sum(node.name.startswith(f"{layer.name}.") for node in graph.node)
        budget = 40 if layer.form == "MoE" else 2 * experts[layer.name] + 60
        assert 0 < count <= budget + _BEYOND.get(name, 0), (layer, count)


def _logits(output: Any) -> Tensor:
    found: Tensor = output[0] if not isinstance(output, Tensor) else output
    return found


def _close(found: Any, expected: Tensor, tolerance: float) -> None:
    """Within that, relative to the largest."""
    difference = torch.from_numpy(np.asarray(found)) - expected
    assert difference.shape == expected.shape
    assert float(difference.abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))
