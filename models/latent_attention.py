"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) with rotary positions.

Shapes: B batch, L length, H heads, D model width, Q and R the ranks of queries and of keys and values,
n and r the widths of a head's features without and with positions, v of its values, h = r/2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.norm import RMSNorm
from dsmoe_compiler.models.rotary import rotate_neighbours


class LatentAttention(nn.Module):
    """Causal self-attention, (B, L, D) to (B, L, D), whose keys and values come from one vector of rank R.

    That vector and one key of positions, which all heads share, are what a cache would hold.
    Modules are named as in the checkpoints of DeepSeek-V2 and V3.
    """

    def __init__(self, config: DeepSeekMoEConfig) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.compresses_queries = config.q_lora_rank is not None
        self.num_heads = heads = config.num_attention_heads
        width, eps = config.hidden_size, config.rms_norm_eps
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scale = self.qk_head_dim**-0.5
        if config.rope_scaling is not None:
            self.scale *= config.rope_scaling.softmax_scale
        if config.q_lora_rank is not None:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.qk_head_dim, bias=False)
        else:
            self.q_proj = nn.Linear(width, heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * self.v_head_dim, width, bias=False)

    def forward(self, x_BLD: Tensor, cos_L1h: Tensor, sin_L1h: Tensor) -> Tensor:
        q_BLH = torch.unflatten(self.queries(x_BLD), -1, (self.num_heads, -1))
        q_BLHn, q_BLHr = torch.split(q_BLH, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent_BLR, k_BLr = torch.split(
            self.kv_a_proj_with_mqa(x_BLD), [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        kv_BLH = torch.unflatten(self.kv_b_proj(self.kv_a_layernorm(latent_BLR)), -1, (self.num_heads, -1))
        k_BLHn, v_BLHv = torch.split(kv_BLH, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)

        q_BLHr = rotate_neighbours(q_BLHr, cos_L1h, sin_L1h)
        k_BL1r = rotate_neighbours(k_BLr.unsqueeze(2), cos_L1h, sin_L1h)
        k_BLHr = k_BL1r.expand(-1, -1, self.num_heads, -1)
        y_BHLv = F.scaled_dot_product_attention(
            torch.cat((q_BLHn, q_BLHr), dim=-1).transpose(1, 2),
            torch.cat((k_BLHn, k_BLHr), dim=-1).transpose(1, 2),
            v_BLHv.transpose(1, 2),
            is_causal=True,
            scale=self.scale,
        )
        out_BLD: Tensor = self.o_proj(y_BHLv.transpose(1, 2).flatten(2))
        return out_BLD

    def queries(self, x_BLD: Tensor) -> Tensor:
        """Every head's query, (B, L, H·(n + r)), from a vector of rank Q where queries are compressed."""
        if not self.compresses_queries:
            whole: Tensor = self.q_proj(x_BLD)
            return whole
        low_rank: Tensor = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BLD)))
        return low_rank
