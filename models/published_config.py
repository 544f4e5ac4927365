"""The config.json of DeepSeek-MoE-16B, `model_type: "deepseek"`, as a configuration of the zoo.

Every field is honoured, refused, or known to change nothing of what the model computes; the rest are named.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsmoe_compiler.models.config import DeepSeekMoEConfig

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
_OPTIONAL_SIZES = ("intermediate_size", "num_key_value_heads", "first_k_dense_replace", "moe_layer_freq")
_NUMBERS = ("rms_norm_eps", "rope_theta")
# What the zoo's model does is this; DeepSeek's code would do something else where they say otherwise.
_ONLY: dict[str, object] = {
    "architectures": ["DeepseekForCausalLM"],
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
# Training, generation, bookkeeping; slices of one matrix product (pretraining_tp); and the dtype of the
# weights and how they are quantised, which are the reader's business.
_WITHOUT_EFFECT = (
    "model_type",
    "auto_map",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "aux_loss_alpha",
    "seq_aux",
    "pretraining_tp",
    "ep_size",
)


@dataclass(frozen=True)
class PublishedConfig:
    """The configuration, and the fields that no release of the model has."""

    config: DeepSeekMoEConfig
    unknown: tuple[str, ...]


def from_published(fields: Mapping[str, object]) -> PublishedConfig:
    """The configuration that the fields of a config.json say.

    Raises ValueError, one line that names field and value, for a field that is missing, of another type, or
    asks for what the zoo's model does not do.
    """
    for name, value in _ONLY.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}; this model has {value!r} only")
    missing = [name for name in _SIZES if name not in fields]
    if missing:
        raise ValueError(f"lacks {missing[0]}")
    values: dict[str, Any] = {
        **{name: _size(name, fields[name]) for name in (*_SIZES, *_OPTIONAL_SIZES) if name in fields},
        **{name: _number(name, fields[name]) for name in _NUMBERS if name in fields},
    }
    renormalised = fields.get("norm_topk_prob", False)
    if not isinstance(renormalised, bool):
        raise ValueError(f"norm_topk_prob is {renormalised!r}, which is neither true nor false")
    known = {*_SIZES, *_OPTIONAL_SIZES, *_NUMBERS, *_ONLY, *_WITHOUT_EFFECT, "norm_topk_prob"}
    config = DeepSeekMoEConfig(**values, norm_topk_prob=renormalised)
    return PublishedConfig(config, tuple(name for name in fields if name not in known))


def _size(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, which is no integer")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, which is no number")
    return float(value)
