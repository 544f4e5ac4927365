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
        group_scores_TG = grouped(scores_TE, self.n_group).amax(dim=-1)
        return scores_TE.masked_fill(~in_best_groups(scores_TE, group_scores_TG, self.topk_group), 0.0)


def grouped(scores_TE: Tensor, n_group: int) -> Tensor:
    """The scores group by group, (T, G, M)."""
    tokens, experts = scores_TE.shape
    return scores_TE.view(tokens, n_group, experts // n_group)


def in_best_groups(scores_TE: Tensor, group_scores_TG: Tensor, topk_group: int) -> Tensor:
    """Which experts are in each token's best groups, (T, E), bool."""
    tokens, experts = scores_TE.shape
    groups = group_scores_TG.shape[1]
    best = group_scores_TG.topk(topk_group, dim=-1).indices
    kept_TG = torch.zeros_like(group_scores_TG).scatter(1, best, 1.0)
    kept_TGM = kept_TG.unsqueeze(-1).expand(tokens, groups, experts // groups)
    return kept_TGM.reshape(tokens, experts).bool()
