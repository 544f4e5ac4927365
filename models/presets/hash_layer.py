"""Hash Layer (arXiv 2106.04426), as DeepSeekMoE is compared with it, and one that fits a test."""

from dsmoe_compiler.models.baseline_configs import HashLayerConfig
from dsmoe_compiler.models.presets.baseline_sizes import TINY, TINY_EXPERT_WIDTH, VALIDATION
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.presets.widths import nearest_width

HASH_LAYER: dict[str, Preset[HashLayerConfig]] = {
    "hash-tiny": Preset(
        "Hash Layer in three layers, the first dense: for tests",
        HashLayerConfig(**TINY, num_experts_per_tok=1, moe_intermediate_size=TINY_EXPERT_WIDTH),
    ),
    "hash-layer-2b": Preset(
        "Hash Layer of the validation experiments (DeepSeekMoE, Table 1)",
        HashLayerConfig(**VALIDATION, num_experts_per_tok=1, moe_intermediate_size=nearest_width(1280, 1)),
    ),
}
