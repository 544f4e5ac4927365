"""Causal self-attention with rotary positions, as in LLaMA and DeepSeek-MoE-16B.

Shapes: B batch, L length, H heads of queries, N heads of keys and values, d head width, h = d/2,
D = H·d model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.models.decoder_config import DecoderConfig
from dsmoe_compiler.models.rotary import rotate_halves


class Attention(nn.Module):
    """Causal self-attention, (B, L, D) to (B, L, D); H/N heads of queries share one of keys and values.

    Multi-head attention where N = H, grouped-query attention (arXiv 2305.13245) where N < H.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, shared_width = config.hidden_size, config.key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.grouped = config.key_value_heads < config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, shared_width, bias=False)
        self.v_proj = nn.Linear(width, shared_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, cos_L1h: Tensor, sin_L1h: Tensor) -> Tensor:
        q_BLHd = rotate_halves(self.split_heads(self.q_proj(x_BLD)), cos_L1h, sin_L1h)
        k_BLNd = rotate_halves(self.split_heads(self.k_proj(x_BLD)), cos_L1h, sin_L1h)
        v_BLNd = self.split_heads(self.v_proj(x_BLD))
        y_BHLd = F.scaled_dot_product_attention(
            q_BLHd.transpose(1, 2),
            k_BLNd.transpose(1, 2),
            v_BLNd.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.grouped,
        )
        out_BLD: Tensor = self.o_proj(y_BHLd.transpose(1, 2).reshape(x_BLD.shape))
        return out_BLD

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, H·d) to (B, L, H, d); the same with N."""
        return torch.unflatten(x, -1, (-1, self.head_dim))
