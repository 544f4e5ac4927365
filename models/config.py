"""The sizes of a DeepSeekMoE model and of its successors V2 and V3, checked where they are written."""

from dataclasses import dataclass
from typing import Literal

from dsmoe_compiler.models.decoder_config import require_not_negative, require_positive
from dsmoe_compiler.models.moe_config import MoEConfig
from dsmoe_compiler.models.yarn import YarnScaling

# How experts are chosen, with the scores that each way of choosing is published with.
SCORING = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}


@dataclass(frozen=True, kw_only=True)
class DeepSeekMoEConfig(MoEConfig):
    """The sizes that make one DeepSeekMoE; fields are named as in DeepSeek's config.json, and default to V1.

    Raises ValueError, one line, when the sizes cannot make a model.
    """

    # Which experts (E in n_group groups, the best topk_group of which stay), and how they weigh.
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    # Multi-head latent attention, where kv_lora_rank is given; widths of one head but for the ranks.
    q_lora_rank: int | None = None  # None: queries are not compressed
    kv_lora_rank: int | None = None  # None: multi-head attention
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_scaling: YarnScaling | None = None  # only with latent attention

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_shared_experts")
        self._check_gate()

    def _check_gate(self) -> None:
        require_positive(self, "n_group", "topk_group", "routed_scaling_factor")
        if self.topk_method not in SCORING:
            raise ValueError(f"topk_method must be one of {', '.join(SCORING)}, got {self.topk_method!r}")
        if self.scoring_func != SCORING[self.topk_method]:
            raise ValueError(
                f"topk_method={self.topk_method!r} needs scoring_func={SCORING[self.topk_method]!r}, "
                f"got {self.scoring_func!r}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts}")
        if self.topk_method == "noaux_tc" and self.n_routed_experts < 2 * self.n_group:
            raise ValueError(f"topk_method='noaux_tc' needs two experts a group, got n_group={self.n_group}")
        if self.topk_method == "greedy" and self.n_group != 1:
            raise ValueError(f"topk_method='greedy' has no groups, got n_group={self.n_group}")
        in_groups = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > in_groups:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {in_groups} experts of "
                f"topk_group={self.topk_group} groups"
            )

    def _check_attention(self) -> None:
        if self.kv_lora_rank is None:
            if self.q_lora_rank is not None or self.rope_scaling is not None:
                raise ValueError("q_lora_rank and rope_scaling need kv_lora_rank")
            super()._check_attention()
            return
        require_positive(self, "kv_lora_rank", "qk_rope_head_dim", "v_head_dim")
        require_not_negative(self, "qk_nope_head_dim")
        if self.q_lora_rank is not None:
            require_positive(self, "q_lora_rank")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"rotary embedding needs an even qk_rope_head_dim, got {self.qk_rope_head_dim}")
