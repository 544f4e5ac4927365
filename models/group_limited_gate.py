"""The gate of DeepSeek-V2: a token's experts lie in few groups, so on few devices.

Shapes: T tokens, E routed experts in G groups of E/G = M.
"""

import torch
from torch import Tensor

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.softmax_gate import SoftmaxGate


class GroupLimitedGate(SoftmaxGate):
    """The softmax gate, choosing from the `topk_group` groups that hold the best experts (section 2.2.2)."""

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__(config)
        self.n_group = config.n_group
        self.topk_group = config.topk_group

    def allowed(self, scores_TE: Tensor) -> Tensor:
        """The scores, 0 in the groups that are left out."""
        scores_TGM = torch.unflatten(scores_TE, -1, (self.n_group, -1))
        return scores_TGM.masked_fill(left_out(scores_TGM.amax(dim=-1), self.topk_group), 0.0).flatten(1)


def left_out(group_scores_TG: Tensor, topk_group: int) -> Tensor:
    """Which groups are not among each token's best, (T, G, 1), bool."""
    best = group_scores_TG.topk(topk_group, dim=-1).indices
    kept_TG = torch.zeros_like(group_scores_TG).scatter(1, best, 1.0)
    return (kept_TG == 0).unsqueeze(-1)
