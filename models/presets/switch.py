"""Switch Transformer (arXiv 2101.03961), as DeepSeekMoE is compared with it, and one that fits a test."""

from dsmoe_compiler.models.baseline_configs import SwitchConfig
from dsmoe_compiler.models.presets.baseline_sizes import TINY, TINY_EXPERT_WIDTH, VALIDATION
from dsmoe_compiler.models.presets.preset import Preset
from dsmoe_compiler.models.presets.widths import nearest_width

SWITCH: dict[str, Preset[SwitchConfig]] = {
    "switch-tiny": Preset(
        "Switch Transformer in three layers, the first dense: for tests",
        SwitchConfig(**TINY, num_experts_per_tok=1, moe_intermediate_size=TINY_EXPERT_WIDTH),
    ),
    "switch-2b": Preset(
        "Switch Transformer of the validation experiments (DeepSeekMoE, Table 1)",
        SwitchConfig(**VALIDATION, num_experts_per_tok=1, moe_intermediate_size=nearest_width(1280, 1)),
    ),
}
