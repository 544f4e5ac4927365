"""GShard (arXiv 2006.16668), as DeepSeekMoE is compared with it, and one that fits a test."""

from fractions import Fraction

from dsmoe_compiler.models.baseline_configs import GShardConfig
from dsmoe_compiler.models.presets.baseline_sizes import TINY, TINY_EXPERT_WIDTH, VALIDATION
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.presets.widths import nearest_width, next_width


def validation(part: Fraction | int) -> GShardConfig:
    """The validation experiments' GShard, its experts this many times a standard feed-forward."""
    return GShardConfig(**VALIDATION, num_experts_per_tok=2, moe_intermediate_size=nearest_width(1280, part))


GSHARD: dict[str, Preset[GShardConfig]] = {
    "gshard-tiny": Preset(
        "GShard in three layers, the first dense: for tests",
        GShardConfig(**TINY, num_experts_per_tok=2, moe_intermediate_size=TINY_EXPERT_WIDTH),
    ),
    "gshard-2b": Preset("GShard of the validation experiments (DeepSeekMoE, Table 1)", validation(1)),
    "gshard-x1.2": Preset(
        "GShard with experts 1.2 times as wide (DeepSeekMoE, Table 8)", validation(Fraction(6, 5))
    ),
    "gshard-x1.5": Preset(
        "GShard with experts 1.5 times as wide (DeepSeekMoE, Table 2)", validation(Fraction(3, 2))
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
