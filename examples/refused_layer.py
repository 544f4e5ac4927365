"""A layer that is almost a known spelling: rows are sorted by expert, and never brought back to their tokens.

dsmoe explain examples.refused_layer:build
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Eight SwiGLU experts as three stacked tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(8, 48, 32) * 0.1) for _ in range(2))
        self.down = nn.Parameter(torch.randn(8, 32, 48) * 0.1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Rows (P, 32), each through the expert of its id."""
        x = x.unsqueeze(-1)
        h = nn.functional.silu(torch.bmm(self.gate[ids], x)) * torch.bmm(self.up[ids], x)
        return torch.bmm(self.down[ids], h).squeeze(-1)


class Layer(nn.Module):
    """(T, 32) -> (T, 32), top-2 of 8 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(32, 8, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        """Each token's experts, weighed and summed."""
        weights, ids = self.router(x).softmax(-1).topk(2)
        sorted_ids, perm = ids.view(-1).sort()
        rows = self.experts(x[perm // 2], sorted_ids)
        return combine(rows, weights)


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Two rows a token, weighed and summed."""
    rows = rows.view(*weights.shape, -1)
    return (rows * weights.unsqueeze(-1)).sum(1)


def build() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """The layer, and a call of it."""
    return Layer().requires_grad_(False), (torch.randn(5, 32),), {}
