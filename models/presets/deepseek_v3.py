"""DeepSeek-V3 (arXiv 2412.19437), as its config.json says, and one that fits a test.

The module that predicts a second token, layer 61 of the checkpoint, is left out: it is for training and for
speculative decoding.
"""

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.yarn import YarnScaling

FROM_4K_TO_160K = YarnScaling(
    factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
)

DEEPSEEK_V3: dict[str, Preset[DeepSeekMoEConfig]] = {
    "deepseek-v3-tiny": Preset(
        "DeepSeek-V3's gate and attention in three layers, the first dense: for tests",
        DeepSeekMoEConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=512,
            n_routed_experts=24,
            n_shared_experts=1,
            num_experts_per_tok=4,
            moe_intermediate_size=88,
            first_k_dense_replace=1,
            intermediate_size=352,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            q_lora_rank=52,
            kv_lora_rank=44,
            qk_nope_head_dim=20,
            qk_rope_head_dim=12,
            v_head_dim=28,
            rope_scaling=FROM_4K_TO_160K,
        ),
    ),
    "deepseek-v3": Preset(
        "DeepSeek-V3, 671B, without the module that predicts a second token",
        DeepSeekMoEConfig(
            hidden_size=7168,
            num_hidden_layers=61,
            num_attention_heads=128,
            vocab_size=129280,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            intermediate_size=18432,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_scaling=FROM_4K_TO_160K,
        ),
    ),
}
