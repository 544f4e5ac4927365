"""Whole models on a device, compiled, against eager."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

import dsmoe_compiler
from dsmoe_compiler.models.zoo import build
from tests.gpu import exact
from tests.gpu.where import DEVICE, DTYPES, INTERPRETED
from tests.tiny_models import Experts, SeparateExperts, relative, tokens

pytestmark = pytest.mark.gpu

needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
# Of a token's logits. Below float32 eager rounds after every operator, and a token whose experts hang on such
# a rounding may go to others in one of the two: what is compared there is the median token.
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
LENGTHS = ((2, 9), (1, 1)) if INTERPRETED else ((2, 9), (1, 1), (4, 64), (1, 700))


def _compiled(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    program = dsmoe_compiler.compile(model, args, kwargs, backend="triton", require_fused=True)
    assert program.backend == "triton" and program.report.layers
    return program


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_zoo(dtype: torch.dtype) -> None:
    model = build("deepseek-moe-tiny", dtype=dtype).to(DEVICE)
    program = _compiled(model, tokens(2, 9).to(DEVICE))
    with torch.no_grad():
        texts = [tokens(*size, seed=1).to(DEVICE) for size in LENGTHS]
        errors = torch.cat([exact.by_token(program(ids), model(ids)) for ids in texts])
    assert (errors.max() if dtype is torch.float32 else errors.median()) <= ALLOWED[dtype]
    assert errors.isfinite().all()


@pytest.mark.parametrize("layer", [Experts, SeparateExperts])
def test_a_layer_alone(layer: type[nn.Module]) -> None:
    """One of stacked tensors; one of separate modules, which are brought together on the device."""
    model = layer().to(DEVICE).eval()
    program = _compiled(model, torch.randn(5, 16, device=DEVICE))
    for count in (0, 1, 5, 33):
        x = torch.randn(count, 16, device=DEVICE)
        with torch.no_grad():
            assert relative(program(x), model(x)) <= ALLOWED[torch.float32]


def test_on_a_device_triton_is_what_auto_means() -> None:
    if INTERPRETED:
        pytest.skip("needs a CUDA device; the interpreter is none")
    model = Experts().to(DEVICE).eval()
    assert dsmoe_compiler.compile(model, (torch.randn(5, 16, device=DEVICE),)).backend == "triton"


@needs_transformers
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "mixtral"])
def test_transformers(name: str) -> None:
    from tests.transformers_models import VOCABULARY, family

    model = (_qwen3() if name == "qwen3_moe" else family(name)).to(DEVICE)
    program = _compiled(model, input_ids=tokens(2, 7, vocabulary=VOCABULARY).to(DEVICE), use_cache=False)
    for size in LENGTHS[:3]:
        size = (size[0], min(size[1], 60))
        ids = tokens(*size, vocabulary=VOCABULARY, seed=1).to(DEVICE)
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
            assert relative(program(input_ids=ids, use_cache=False).logits, wanted) <= ALLOWED[torch.float32]


def _qwen3() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
    }
    config = Qwen3MoeConfig(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: nn.Module = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():  # a trained router is not flat
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.125)
    return model.eval()
