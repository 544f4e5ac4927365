"""Switch Transformer's top-1 mixture of experts (arXiv 2101.03961, sections 2.1-2.2 and 2.4).

Shapes: G groups of S tokens (a group is a sequence: B groups of L), D model width, E experts, C places that
an expert has for a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.models.baseline_configs import SwitchConfig
from dsmoe_compiler.models.capacity_experts import CapacityExperts, places, seat
from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.learned_gate import LearnedGate


class SwitchGate(LearnedGate):
    """Send each token to its best expert, weighed by its probability, if there is room; else nowhere."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__(config.n_routed_experts, config.hidden_size)
        self.config = config

    def forward(self, x_GSD: Tensor) -> Tensor:
        """The combine weights (G, S, E, C), float32."""
        x_GSD = x_GSD.float()
        if self.training:
            low, high = 1 - self.config.jitter, 1 + self.config.jitter
            x_GSD = x_GSD * torch.empty_like(x_GSD).uniform_(low, high)
        weight_GS, ids_GS = self.logits(x_GSD).softmax(dim=-1).max(dim=-1)
        chosen_GSE = F.one_hot(ids_GS, self.config.n_routed_experts)
        place_GS = (places(chosen_GSE) * chosen_GSE).sum(dim=-1)
        return seat(weight_GS, chosen_GSE, place_GS, self.capacity(x_GSD.shape[1]))

    def capacity(self, tokens: int) -> int:
        """Places that an expert has for a group of so many tokens, S/E·factor rounded down (eq. 3)."""
        factor = self.config.train_capacity_factor if self.training else self.config.eval_capacity_factor
        return max(int(tokens / self.config.n_routed_experts * factor), self.config.min_capacity)


class SwitchMoE(nn.Module):
    """One expert a token, (B, L, D) to (B, L, D)."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.gate = SwitchGate(config)
        self.experts = CapacityExperts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        out_BLD: Tensor = self.experts(x_BLD, self.gate(x_BLD))
        return out_BLD


class SwitchForCausalLM(CausalLM[SwitchConfig]):
    """A decoder whose mixtures of experts are Switch Transformer's, their experts SwiGLU as DeepSeekMoE's."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__(config, moe=SwitchMoE)
