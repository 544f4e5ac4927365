"""DeepSeekMoE (arXiv 2401.06066) in plain torch: fine-grained routed experts beside isolated shared ones.

Modules are named as in the checkpoints of DeepSeek-MoE-16B, except that the routed experts are stacked.
Shapes: B batch, L length, T = B·L tokens, D model width, F expert hidden width, E routed experts,
K experts per token, S shared experts, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.models.attention import Attention, rotary_table
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.experts import RoutedExperts


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, the root mean square taken in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), (..., D) to (..., D)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    """Choose each token's K experts: the best softmax scores, neither renormalised nor scaled (eq. 10-11)."""

    def __init__(self, num_experts: int, hidden_size: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' ids (T, K), int64, and their scores (T, K), float32."""
        # In float32 in every model, as DeepSeek publishes it: rounded scores tie, and flip choices.
        scores_TE = F.linear(x_TD.float(), self.weight.float()).softmax(dim=-1)
        weights_TK, ids_TK = scores_TE.topk(self.num_experts_per_tok, dim=-1)
        return ids_TK, weights_TK


class MoE(nn.Module):
    """Shared experts, always on, plus the routed ones a token chose (eq. 9; the layer adds the residual).

    The S shared experts are one feed-forward of width S·F: the same sum, as the checkpoints hold it.
    """

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config.n_routed_experts, width, config.num_experts_per_tok)
        self.experts = RoutedExperts(config.n_routed_experts, width, hidden)
        self.shared_experts = FeedForward(width, config.n_shared_experts * hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        x_TD = x_BLD.reshape(batch * length, width)
        ids_TK, weights_TK = self.gate(x_TD)
        routed_TD = self.experts(x_TD, ids_TK, weights_TK)
        out_BLD: Tensor = routed_TD.view(batch, length, width) + self.shared_experts(x_BLD)
        return out_BLD


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward or an MoE, each normed before and added after (eq. 1-2)."""

    def __init__(self, config: DeepSeekMoEConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        dense = index < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.self_attn = Attention(width, config.num_attention_heads)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = FeedForward(width, config.intermediate_size) if dense else MoE(config)

    def forward(self, x_BLD: Tensor, cos_Ld: Tensor, sin_Ld: Tensor) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_Ld, sin_Ld)
        out_BLD: Tensor = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return out_BLD


class DeepSeekMoEModel(nn.Module):
    """Embedding, layers and a last norm: ids (B, L) to hidden states (B, L, D)."""

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BLD = self.embed_tokens(input_ids)
        cos_Ld, sin_Ld = rotary_table(
            input_ids.shape[1], self.head_dim, self.rope_theta, device=x_BLD.device, dtype=x_BLD.dtype
        )
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos_Ld, sin_Ld)
        out_BLD: Tensor = self.norm(x_BLD)
        return out_BLD


class DeepSeekMoEForCausalLM(nn.Module):
    """The whole language model.

    Parameters hold no values that mean anything until they are loaded or initialised.
    """

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DeepSeekMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Next-token logits (B, L, V) from ids (B, L), int64 in [0, V); B and L may be 0."""
        logits_BLV: Tensor = self.lm_head(self.model(input_ids))
        return logits_BLV
