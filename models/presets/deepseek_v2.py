"""DeepSeek-V2 (arXiv 2405.04434), as its config.json says, and one that fits a test."""

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.yarn import YarnScaling

FROM_4K_TO_160K = YarnScaling(
    factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
)

DEEPSEEK_V2: dict[str, Preset[DeepSeekMoEConfig]] = {
    "deepseek-v2-tiny": Preset(
        "DeepSeek-V2's gate and attention in three layers, the first dense: for tests",
        DeepSeekMoEConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=512,
            n_routed_experts=24,
            n_shared_experts=2,
            num_experts_per_tok=4,
            moe_intermediate_size=88,
            first_k_dense_replace=1,
            intermediate_size=352,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=16.0,
            q_lora_rank=52,
            kv_lora_rank=44,
            qk_nope_head_dim=20,
            qk_rope_head_dim=12,
            v_head_dim=28,
            rope_scaling=FROM_4K_TO_160K,
        ),
    ),
    "deepseek-v2-lite": Preset(
        "DeepSeek-V2-Lite, 16B",
        DeepSeekMoEConfig(
            hidden_size=2048,
            num_hidden_layers=27,
            num_attention_heads=16,
            vocab_size=102400,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            intermediate_size=10944,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_scaling=FROM_4K_TO_160K,
        ),
    ),
    "deepseek-v2": Preset(
        "DeepSeek-V2, 236B",
        DeepSeekMoEConfig(
            hidden_size=5120,
            num_hidden_layers=60,
            num_attention_heads=128,
            vocab_size=102400,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            first_k_dense_replace=1,
            intermediate_size=12288,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_scaling=FROM_4K_TO_160K,
        ),
    ),
}
