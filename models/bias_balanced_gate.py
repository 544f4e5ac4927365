"""The gate of DeepSeek-V3, balanced without a loss (arXiv 2412.19437, eq. 13-16).

Shapes: T tokens, D model width, E routed experts in G groups of E/G = M, K experts per token.
"""

import torch
from torch import Tensor

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.group_limited_gate import grouped, in_best_groups
from dsmoe_compiler.models.learned_gate import LearnedGate


class BiasBalancedGate(LearnedGate):
    """Choose by sigmoid scores plus a bias that steers the load; weigh by the scores alone.

    A group is worth the sum of its two best biased scores. `e_score_correction_bias` (E,), float32, is a
    buffer: it follows the experts' loads, not a gradient (arXiv 2408.15664).
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__(config.n_routed_experts, config.hidden_size)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' ids (T, K), int64, and their weights (T, K), float32."""
        scores_TE = self.logits(x_TD).sigmoid()
        ids_TK = self.allowed(scores_TE + self.e_score_correction_bias).topk(self.num_experts_per_tok).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return ids_TK, weights_TK * self.routed_scaling_factor

    def allowed(self, biased_TE: Tensor) -> Tensor:
        """The biased scores, -inf in the groups that are left out: they may be negative, 0 could win."""
        group_scores_TG = grouped(biased_TE, self.n_group).topk(2, dim=-1).values.sum(dim=-1)
        kept_TE = in_best_groups(biased_TE, group_scores_TG, self.topk_group)
        return biased_TE.masked_fill(~kept_TE, float("-inf"))
