"""The gate of DeepSeekMoE, and of DeepSeek-V2-Lite.

Shapes: T tokens, D model width, E routed experts, K experts per token.
"""

from torch import Tensor

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.learned_gate import LearnedGate


class SoftmaxGate(LearnedGate):
    """Choose each token's K best softmax scores (DeepSeekMoE, eq. 10-11).

    Published models neither normalise nor scale the weights. Where they are normalised they are not scaled:
    so does the code published with DeepSeek-V2.
    """

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__(config.n_routed_experts, config.hidden_size)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' ids (T, K), int64, and their weights (T, K), float32."""
        scores_TE = self.allowed(self.logits(x_TD).softmax(dim=-1))
        weights_TK, ids_TK = scores_TE.topk(self.num_experts_per_tok, dim=-1)
        return ids_TK, self.weighed(weights_TK)

    def allowed(self, scores_TE: Tensor) -> Tensor:
        """The scores to choose from: all of them."""
        return scores_TE

    def weighed(self, scores_TK: Tensor) -> Tensor:
        """What the chosen experts' answers are multiplied by."""
        if self.norm_topk_prob and self.num_experts_per_tok > 1:
            return scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if self.routed_scaling_factor != 1.0:
            return scores_TK * self.routed_scaling_factor
        return scores_TK
