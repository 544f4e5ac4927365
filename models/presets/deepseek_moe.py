"""DeepSeekMoE (arXiv 2401.06066): its three sizes, its ablations, and two that fit a test and a laptop."""

from fractions import Fraction

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.presets.widths import nearest_width, next_width


def validation(shared: int, chosen: int, routed: int, part: Fraction) -> DeepSeekMoEConfig:
    """A model of the validation experiments (appendix A): experts of this part of a standard feed-forward."""
    return DeepSeekMoEConfig(
        hidden_size=1280,
        num_hidden_layers=9,
        num_attention_heads=10,
        vocab_size=8192,
        n_routed_experts=routed,
        n_shared_experts=shared,
        num_experts_per_tok=chosen,
        moe_intermediate_size=nearest_width(1280, part),
    )


def scaling_study(shared: int, chosen: int, dense_parts: int) -> DeepSeekMoEConfig:
    """A model of section 7, its dense layer as many parts wide as a token activates (no width is given)."""
    return DeepSeekMoEConfig(
        hidden_size=4096,
        num_hidden_layers=62,
        num_attention_heads=32,
        vocab_size=102400,
        n_routed_experts=128,
        n_shared_experts=shared,
        num_experts_per_tok=chosen,
        moe_intermediate_size=next_width(4096, Fraction(1, 8)),
        first_k_dense_replace=1,
        intermediate_size=next_width(4096, dense_parts),
    )


DEEPSEEK_MOE: dict[str, Preset[DeepSeekMoEConfig]] = {
    "deepseek-moe-tiny": Preset(
        "three layers, the first dense, 4.9 MB in float32: for tests and pictures",
        DeepSeekMoEConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=512,
            n_routed_experts=16,
            n_shared_experts=2,
            num_experts_per_tok=4,
            moe_intermediate_size=88,
            first_k_dense_replace=1,
            intermediate_size=352,
        ),
    ),
    "deepseek-moe-demo": Preset(
        "two layers with the experts of the 16B (64 routed, 6 chosen, 2 shared), 356 MB in float32: to time",
        DeepSeekMoEConfig(
            hidden_size=768,
            num_hidden_layers=2,
            num_attention_heads=12,
            vocab_size=4096,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=256,
        ),
    ),
    "deepseek-moe-2b": Preset(
        "DeepSeekMoE 2B of the validation experiments (paper, Table 1)",
        validation(shared=1, chosen=7, routed=63, part=Fraction(1, 4)),
    ),
    "deepseek-moe-2b-1-of-15": Preset(
        "the 2B before its experts were divided, 1 shared (paper, Figure 3)",
        validation(shared=1, chosen=1, routed=15, part=Fraction(1)),
    ),
    "deepseek-moe-2b-3-of-31": Preset(
        "the 2B with experts of half the size, 1 shared (paper, Figure 3)",
        validation(shared=1, chosen=3, routed=31, part=Fraction(1, 2)),
    ),
    "deepseek-moe-2b-2-shared": Preset(
        "the 2B with 2 shared experts (paper, section 4.4)",
        validation(shared=2, chosen=6, routed=62, part=Fraction(1, 4)),
    ),
    "deepseek-moe-2b-4-shared": Preset(
        "the 2B with 4 shared experts (paper, section 4.4)",
        validation(shared=4, chosen=4, routed=60, part=Fraction(1, 4)),
    ),
    "deepseek-moe-2b-half": Preset(
        "the 2B trained with half of its experts activated (paper, Figure 6)",
        validation(shared=1, chosen=3, routed=63, part=Fraction(1, 4)),
    ),
    "deepseek-moe-16b": Preset(
        "DeepSeekMoE 16B, the released model (paper, Table 3)",
        DeepSeekMoEConfig(
            hidden_size=2048,
            num_hidden_layers=28,
            num_attention_heads=16,
            vocab_size=102400,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            intermediate_size=10944,
        ),
    ),
    "deepseek-moe-142b-half": Preset(
        "DeepSeekMoE 142B, half of its experts activated (paper, Table 6)",
        scaling_study(shared=2, chosen=6, dense_parts=1),
    ),
    "deepseek-moe-145b": Preset(
        "DeepSeekMoE 145B, the scaling study (paper, Table 6)",
        scaling_study(shared=4, chosen=12, dense_parts=2),
    ),
}
