"""The mixtures of experts that the DeepSeekMoE paper compares with: Hash Layer, Switch and GShard."""

from fractions import Fraction
from typing import TypedDict

from dsmoe_compiler.models.baseline_configs import GShardConfig, HashLayerConfig, SwitchConfig
from dsmoe_compiler.models.moe_config import MoEConfig
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.presets.widths import nearest_width, next_width


class Sizes(TypedDict):
    """What the three have in common at one size."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    n_routed_experts: int


# The example input's 11 tokens a sequence find 4 places with an expert of the tiny models, and fill some.
TINY: Sizes = {
    "hidden_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "n_routed_experts": 6,
}
VALIDATION: Sizes = {
    "hidden_size": 1280,
    "num_hidden_layers": 9,
    "num_attention_heads": 10,
    "vocab_size": 8192,
    "n_routed_experts": 16,
}


def gshard_2b(part: Fraction) -> GShardConfig:
    """The validation experiments' GShard, its experts this many times a standard feed-forward."""
    return GShardConfig(**VALIDATION, num_experts_per_tok=2, moe_intermediate_size=nearest_width(1280, part))


BASELINES: dict[str, Preset[MoEConfig]] = {
    "hash-tiny": Preset(
        "Hash Layer in three layers, the first dense: for tests",
        HashLayerConfig(
            **TINY,
            num_experts_per_tok=1,
            moe_intermediate_size=56,
            first_k_dense_replace=1,
            intermediate_size=208,
        ),
    ),
    "hash-layer-2b": Preset(
        "Hash Layer of the validation experiments (DeepSeekMoE, Table 1)",
        HashLayerConfig(**VALIDATION, num_experts_per_tok=1, moe_intermediate_size=nearest_width(1280, 1)),
    ),
    "switch-tiny": Preset(
        "Switch Transformer in three layers, the first dense: for tests",
        SwitchConfig(
            **TINY,
            num_experts_per_tok=1,
            moe_intermediate_size=56,
            first_k_dense_replace=1,
            intermediate_size=208,
        ),
    ),
    "switch-2b": Preset(
        "Switch Transformer of the validation experiments (DeepSeekMoE, Table 1)",
        SwitchConfig(**VALIDATION, num_experts_per_tok=1, moe_intermediate_size=nearest_width(1280, 1)),
    ),
    "gshard-tiny": Preset(
        "GShard in three layers, the first dense: for tests",
        GShardConfig(
            **TINY,
            num_experts_per_tok=2,
            moe_intermediate_size=56,
            first_k_dense_replace=1,
            intermediate_size=208,
        ),
    ),
    "gshard-2b": Preset(
        "GShard of the validation experiments (DeepSeekMoE, Table 1)", gshard_2b(Fraction(1))
    ),
    "gshard-x1.2": Preset(
        "GShard with experts 1.2 times as wide (DeepSeekMoE, Table 8)", gshard_2b(Fraction(6, 5))
    ),
    "gshard-x1.5": Preset(
        "GShard with experts 1.5 times as wide (DeepSeekMoE, Table 2)", gshard_2b(Fraction(3, 2))
    ),
    "gshard-137b": Preset(
        "GShard of the scaling study (DeepSeekMoE, Table 6)",
        GShardConfig(
            hidden_size=4096,
            num_hidden_layers=62,
            num_attention_heads=32,
            vocab_size=102400,
            n_routed_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=next_width(4096, 1),
            first_k_dense_replace=1,
            intermediate_size=next_width(4096, 2),
        ),
    ),
}
