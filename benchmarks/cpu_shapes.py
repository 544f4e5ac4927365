"""The layers that ways to run them on a CPU are compared by, and where several copies of one lie in memory.

D model width, F expert hidden width, E routed experts, K experts per token, S shared experts, T tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.peers import with_transformers_experts
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.deepseek_moe import MoE
from dsmoe_compiler.models.random_weights import randomise

_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_TIMES_THE_CACHE = 4
_LEAST_BYTES = int(2.2e9)
_MOST_LAYERS = 8


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer. With shared experts it is the zoo's DeepSeekMoE layer, without them transformers'
    Qwen3-MoE block.
    """

    width: int  # D
    hidden: int  # F
    experts: int  # E
    top_k: int  # K
    shared: int  # S

    @property
    def name(self) -> str:
        return f"D{self.width} F{self.hidden} E{self.experts} K{self.top_k} S{self.shared}"

    @property
    def expert_numbers(self) -> int:
        """How many numbers one expert's three matrices hold."""
        return 3 * self.width * self.hidden

    def layer_bytes(self, dtype: torch.dtype) -> int:
        """Of all routed experts' weights."""
        return self.experts * self.expert_numbers * dtype.itemsize

    def copies(self, dtype: torch.dtype, least: int) -> int:
        """How many layers take turns: so many that a cache holds a small part of them, but `least`."""
        wanted = max(_LEAST_BYTES, _TIMES_THE_CACHE * _l3_bytes())
        return max(least, min(_MOST_LAYERS, round(wanted / self.layer_bytes(dtype))))


SHAPES = {
    "D1024": Shape(width=1024, hidden=704, experts=64, top_k=6, shared=2),
    "D2048": Shape(width=2048, hidden=768, experts=128, top_k=8, shared=0),
}
# The same two kinds of layer, small: what the code is walked with in seconds.
TINY = {
    "D64": Shape(width=64, hidden=32, experts=16, top_k=3, shared=2),
    "D96": Shape(width=96, hidden=64, experts=8, top_k=2, shared=0),
}


def build(shape: Shape, dtype: torch.dtype) -> list[nn.Module]:
    """Layers of the same random weights, each with memory of its own, so that any of them gives the same
    answer.
    """
    first = _empty(shape, "eager", dtype).to_empty(device="cpu")
    randomise(first, seed=0)
    first.requires_grad_(False)
    return [first, *(copy.deepcopy(first) for _ in range(shape.copies(dtype, least=2) - 1))]


def as_transformers(layer: nn.Module, shape: Shape, implementation: str) -> nn.Module:
    """The same layer on the same tensors, its experts run as transformers' `implementation`."""
    twin = _empty(shape, implementation, next(layer.parameters()).dtype)
    if shape.shared:
        return with_transformers_experts(layer, twin, implementation)
    twin.load_state_dict(layer.state_dict(), assign=True)
    return twin.requires_grad_(False).eval()


def route(layer: nn.Module, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that the layer's router chooses, and their weights: ids and weights (T, K)."""
    assert isinstance(layer.gate, nn.Module)
    if isinstance(layer, MoE):
        ids_TK, weights_TK = layer.gate(x_TD)
    else:
        _, weights_TK, ids_TK = layer.gate(x_TD)
    return ids_TK, weights_TK


def expert_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """gate_up (E, 2F, D) and down (E, D, F)."""
    parameters = dict(layer.named_parameters())
    return parameters["experts.gate_up_proj"], parameters["experts.down_proj"]


def _empty(shape: Shape, implementation: str, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        if shape.shared:
            return MoE(_deepseek(shape)).to(dtype).eval()
        config = Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.hidden,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        block: nn.Module = Qwen3MoeSparseMoeBlock(config)
        return block.to(dtype).eval()


def _deepseek(shape: Shape) -> DeepSeekMoEConfig:
    return DeepSeekMoEConfig(
        hidden_size=shape.width,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=1,
        n_routed_experts=shape.experts,
        n_shared_experts=shape.shared,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.hidden,
    )


def _l3_bytes() -> int:
    """The last level of cache, as Linux tells it; 0 where it does not."""
    try:
        return int(_L3.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0
