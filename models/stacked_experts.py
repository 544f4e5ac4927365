"""Weights of SwiGLU experts, one tensor for all experts' matrices of a kind."""

import torch
from torch import nn


class StackedExperts(nn.Module):
    """E SwiGLU experts of hidden width F.

    Parameters: `gate_up_proj` (E, 2F, D), the gate's F rows first, and `down_proj` (E, D, F).
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
