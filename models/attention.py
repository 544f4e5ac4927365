"""Multi-head causal self-attention with rotary positions, as in LLaMA and DeepSeek-MoE-16B.

Shapes: B batch, L length, H heads, d head width, D = H·d model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_table(
    length: int, head_dim: int, theta: float, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cosine and sine of every position's angles, each (L, d), taken in float32 and rounded to `dtype`.

    Computed from the length at every call: no buffer that limits it, nothing to move or to materialise.
    Source: RoFormer (arXiv 2104.09864), eq. 15, in the half-split layout: feature i pairs with i + d/2.
    """
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequency = torch.pow(theta, -pair / head_dim)
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = position.unsqueeze(1) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BHLd: Tensor, cos_Ld: Tensor, sin_Ld: Tensor) -> Tensor:
    """Turn each feature pair (i, i + d/2) by its position's angle; shape and dtype stay."""
    first, second = x_BHLd.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHLd * cos_Ld + turned * sin_Ld


class Attention(nn.Module):
    """Causal self-attention, (B, L, D) to (B, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BLD: Tensor, cos_Ld: Tensor, sin_Ld: Tensor) -> Tensor:
        q_BHLd = rotate(self.split_heads(self.q_proj(x_BLD)), cos_Ld, sin_Ld)
        k_BHLd = rotate(self.split_heads(self.k_proj(x_BLD)), cos_Ld, sin_Ld)
        v_BHLd = self.split_heads(self.v_proj(x_BLD))
        y_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=True)
        out_BLD: Tensor = self.o_proj(y_BHLd.transpose(1, 2).reshape(x_BLD.shape))
        return out_BLD

    def split_heads(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, H, L, d)."""
        batch, length, _ = x_BLD.shape
        return x_BLD.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
