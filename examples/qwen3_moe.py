"""Qwen3-MoE of transformers with random weights: half the widths of Qwen3-30B-A3B, and of its layers three.

dsmoe bench examples.qwen3_moe:build
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

# 128 experts, 8 for each token, as the original; 0.5 B parameters, 1 GB in bfloat16.
GIGABYTE = Qwen3MoeConfig(
    vocab_size=16384,
    hidden_size=1024,
    moe_intermediate_size=384,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    dtype="bfloat16",
)
TINY = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=64,
    moe_intermediate_size=48,
    num_experts=16,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    dtype="bfloat16",
)


def build(config: Qwen3MoeConfig = GIGABYTE) -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    """A model, and an example call of it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, (), {"input_ids": torch.randint(config.vocab_size, (3, 11)), "use_cache": False}


def tiny() -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    """The same, small enough to try things out."""
    return build(TINY)
