"""Hash Layer's top-1 mixture of experts (arXiv 2106.04426): a token's id chooses its expert.

Shapes: B batch, L length, T = B·L tokens, D model width, E experts, V vocabulary.
"""

import torch
from torch import Tensor, nn

from dsmoe_compiler.models.baseline_configs import HashLayerConfig
from dsmoe_compiler.models.decoder import CausalLM, DecoderLayer
from dsmoe_compiler.models.experts import RoutedExperts


class HashGate(nn.Module):
    """A fixed table of experts, `expert_of_token` (V,) int64 in [0, E), which nothing trains."""

    expert_of_token: Tensor

    def __init__(self, config: HashLayerConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.register_buffer("expert_of_token", torch.zeros(config.vocab_size, dtype=torch.int64))

    def forward(self, input_ids: Tensor) -> Tensor:
        """The expert of each token, as (T, 1) ids, from token ids (B, L)."""
        return self.expert_of_token[input_ids].reshape(-1, 1)


class HashMoE(nn.Module):
    """One expert a token, whose answer counts whole."""

    def __init__(self, config: HashLayerConfig) -> None:
        super().__init__()
        self.gate = HashGate(config)
        self.experts = RoutedExperts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        )

    def forward(self, x_BLD: Tensor, input_ids: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D); input_ids (B, L), what the tokens were."""
        batch, length, width = x_BLD.shape
        x_TD = x_BLD.reshape(batch * length, width)
        ids_T1 = self.gate(input_ids)
        weights_T1 = torch.ones_like(ids_T1, dtype=torch.float32)
        out_TD: Tensor = self.experts(x_TD, ids_T1, weights_T1)
        return out_TD.view(batch, length, width)


class HashDecoderLayer(DecoderLayer):
    """A decoder layer whose feed-forward is chosen by what the tokens were."""

    def feed_forward(self, x_BLD: Tensor, input_ids: Tensor) -> Tensor:
        out_BLD: Tensor = self.mlp(x_BLD, input_ids)
        return out_BLD


class HashLayerForCausalLM(CausalLM[HashLayerConfig]):
    """A decoder whose mixtures of experts are Hash Layer's, their experts SwiGLU as DeepSeekMoE's."""

    def __init__(self, config: HashLayerConfig) -> None:
        super().__init__(config, moe=HashMoE, moe_layer=HashDecoderLayer)
