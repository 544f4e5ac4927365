"""One tiny random model per family of transformers that the first release is accepted on."""

import importlib
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "deepseek_v3": _MLA,
    "gpt_oss": {},
    "granitemoe": {},
}
# Set wherever a configuration has the field.
_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 8,
    "attention_dropout": 0.0,
}


def family(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The family's causal language model in eval mode; it would return a cache if nobody asked otherwise."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    causal = importlib.import_module(
        "transformers.models.auto.modeling_auto"
    ).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    config_class = auto.CONFIG_MAPPING[name]
    known = config_class.__dataclass_fields__
    config = config_class(**{k: v for k, v in _FIELDS.items() if k in known} | FAMILIES[name])
    config._attn_implementation = "eager"
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(0)
    model: nn.Module = getattr(module, causal[name])(config).eval()
    for path, tensor in model.named_parameters():  # a trained router is not flat
        if tensor.dim() > 1 or "bias" in path:
            tensor.data.normal_(std=0.125 if tensor.dim() > 1 else 0.05)
    return model.to(dtype)
