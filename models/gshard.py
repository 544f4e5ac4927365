"""GShard's top-2 mixture of experts (arXiv 2006.16668, section 2.2 and algorithm 1).

Shapes: G groups of S tokens (a group is a sequence: B groups of L), D model width, E experts, C places that
an expert has for a group.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.models.baseline_configs import GShardConfig
from dsmoe_compiler.models.capacity_experts import CapacityExperts, places, seat
from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.learned_gate import LearnedGate


class Top2Gate(LearnedGate):
    """Weigh the two best experts of each token against each other, and find a place with both.

    All first choices of a group queue before any second choice. Who comes too late is dropped, and so is, in
    training, a second choice with probability 1 - 2·(its weight); in eval every second choice queues and
    stays, so that a model's answer is one.
    """

    def __init__(self, config: GShardConfig) -> None:
        super().__init__(config.n_routed_experts, config.hidden_size)
        self.num_experts = config.n_routed_experts
        self.capacity_factor = config.capacity_factor

    def forward(self, x_GSD: Tensor) -> Tensor:
        """The combine weights (G, S, E, C), float32."""
        capacity = self.capacity(x_GSD.shape[1])
        best_GS2, ids_GS2 = self.logits(x_GSD).softmax(dim=-1).topk(2, dim=-1)
        # Normalised before anybody is dropped: what a dropped choice weighed is lost.
        weight1_GS, weight2_GS = (best_GS2 / best_GS2.sum(dim=-1, keepdim=True)).unbind(dim=-1)
        chosen1_GSE, chosen2_GSE = (F.one_hot(ids_GS, self.num_experts) for ids_GS in ids_GS2.unbind(dim=-1))
        queue1_GSE = places(chosen1_GSE)
        queue2_GSE = places(chosen2_GSE) + chosen1_GSE.sum(dim=1, keepdim=True)
        if self.training:
            weight2_GS = weight2_GS * (2 * weight2_GS > torch.rand_like(weight2_GS))
        place1_GS = (queue1_GSE * chosen1_GSE).sum(dim=-1)
        place2_GS = (queue2_GSE * chosen2_GSE).sum(dim=-1)
        return seat(weight1_GS, chosen1_GSE, place1_GS, capacity) + seat(
            weight2_GS, chosen2_GSE, place2_GS, capacity
        )

    def capacity(self, tokens: int) -> int:
        """Places that an expert has for a group of so many tokens, 2·S/E·factor rounded up."""
        return max(math.ceil(2 * tokens * self.capacity_factor / self.num_experts), 1)


class GShardMoE(nn.Module):
    """Two experts a token, (B, L, D) to (B, L, D)."""

    def __init__(self, config: GShardConfig) -> None:
        super().__init__()
        self.gate = Top2Gate(config)
        self.experts = CapacityExperts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        out_BLD: Tensor = self.experts(x_BLD, self.gate(x_BLD))
        return out_BLD


class GShardForCausalLM(CausalLM[GShardConfig]):
    """A decoder whose mixtures of experts are GShard's, their experts SwiGLU as DeepSeekMoE's."""

    def __init__(self, config: GShardConfig) -> None:
        super().__init__(config, moe=GShardMoE)
