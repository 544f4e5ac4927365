"""Blocks as transformers ships them, in both of its exportable experts implementations."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes.checks import assert_same, compiled, only_layer, some_inputs

_TINY = dict(
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=16,
    num_local_experts=8,
    num_experts=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_hidden_layers=1,
)
# family -> (configuration, block, the router as people say it, whether it has shared experts)
BLOCKS = {
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock", "softmax→top-2, renormalized", False),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock", "softmax→top-2", True),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3MoE",
        "sigmoid+bias→top-2 in 1/2 groups by top2, renormalized, ×2.5",
        True,
    ),
    "gpt_oss": ("GptOssConfig", "GptOssMLP", "top-2→softmax", False),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeMoE", "top-2→softmax", False),
}


SOME = ((3, 4), (1, 1), (1, 17))


class _Block(nn.Module):
    """The block, returning its hidden states alone."""

    def __init__(self, family: str, implementation: str) -> None:
        super().__init__()
        config_name, block_name, _, _ = BLOCKS[family]
        package = f"transformers.models.{family}"
        config_class = getattr(importlib.import_module(f"{package}.configuration_{family}"), config_name)
        config = config_class(**{k: v for k, v in _TINY.items() if hasattr(config_class(), k)})
        config._experts_implementation = implementation
        self.block = getattr(importlib.import_module(f"{package}.modeling_{family}"), block_name)(config)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.block(x)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.view(x.shape)


def made(family: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    return _Block(family, implementation).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", BLOCKS)
def test_fp32(family: str, implementation: str) -> None:
    block = made(family, implementation, torch.float32)
    program = compiled(block, capture="as_written")
    spec = only_layer(program).spec
    assert spec is not None, only_layer(program).refusal
    assert (str(spec.router), spec.shared is not None) == BLOCKS[family][2:]
    assert spec.experts.hidden == 16 and spec.experts.count == 8
    assert_same(program, block, some_inputs(16, shapes=SOME))


@pytest.mark.parametrize("family", BLOCKS)
def test_no_tokens(family: str) -> None:
    block = made(family, "grouped_mm", torch.float32)
    assert_same(compiled(block, capture="as_written"), block, some_inputs(16, shapes=[(0, 2), (2, 0)]))


@pytest.mark.parametrize("family", BLOCKS)
def test_bf16_runs_torchs_own_grouped_product(family: str) -> None:
    block = made(family, "grouped_mm", torch.bfloat16)
    program = compiled(block, capture="as_written")
    assert only_layer(program).fused and only_layer(program).idiom == "sorted, grouped GEMM"
    assert_same(program, block, some_inputs(16, torch.bfloat16, SOME))
