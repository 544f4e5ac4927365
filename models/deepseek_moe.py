"""DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 (2405.04434) and DeepSeek-V3 (2412.19437) in plain torch:
fine-grained routed experts beside isolated shared ones.

Modules are named as in DeepSeek's checkpoints, except that the routed experts are stacked.
Shapes: B batch, L length, T = B·L tokens, D model width, F expert hidden width, E routed experts,
K experts per token, S shared experts.
"""

from collections.abc import Callable

from torch import Tensor, nn

from dsmoe_compiler.models.bias_balanced_gate import BiasBalancedGate
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.experts import RoutedExperts
from dsmoe_compiler.models.feed_forward import FeedForward
from dsmoe_compiler.models.group_limited_gate import GroupLimitedGate
from dsmoe_compiler.models.latent_attention import LatentAttention
from dsmoe_compiler.models.rotary import Rotary
from dsmoe_compiler.models.softmax_gate import SoftmaxGate

GATES: dict[str, Callable[[DeepSeekMoEConfig], nn.Module]] = {
    "greedy": SoftmaxGate,
    "group_limited_greedy": GroupLimitedGate,
    "noaux_tc": BiasBalancedGate,
}


class MoE(nn.Module):
    """Shared experts, always on, plus the routed ones a token chose (eq. 9; the layer adds the residual).

    The S shared experts are one feed-forward of width S·F: the same sum, as the checkpoints hold it.
    """

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.gate = GATES[config.topk_method](config)
        self.experts = RoutedExperts(config.n_routed_experts, width, hidden)
        self.shared_experts = FeedForward(width, config.n_shared_experts * hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        x_TD = x_BLD.reshape(batch * length, width)
        ids_TK, weights_TK = self.gate(x_TD)
        routed_TD = self.experts(x_TD, ids_TK, weights_TK)
        out_BLD: Tensor = routed_TD.view(batch, length, width) + self.shared_experts(x_BLD)
        return out_BLD


class DeepSeekMoEForCausalLM(CausalLM[DeepSeekMoEConfig]):
    """The whole language model: DeepSeekMoE, or V2 or V3 where the configuration says so."""

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        if config.kv_lora_rank is None:
            super().__init__(config, moe=MoE)
        else:
            rotary = Rotary(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
            super().__init__(config, attention=LatentAttention, moe=MoE, rotary=rotary)
