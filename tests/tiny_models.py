"""Models small enough to compile in a second, for tests of the front door."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmoe_compiler.models.zoo import build


class Experts(nn.Module):
    """A whole MoE layer (T, D) -> (T, D): softmax, top-2 of 8, renormalised, SwiGLU by gathered weights."""

    def __init__(self, width: int = 16, hidden: int = 12, experts: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(size, generator=generator) * 0.3)

        self.gate = normal(experts, width)
        self.gate_up, self.down = normal(experts, 2 * hidden, width), normal(experts, width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) float."""
        weights, ids = F.linear(x, self.gate).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        rows, pairs = x.repeat_interleave(2, 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[pairs], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[pairs], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, y.shape[-1]).sum(1)


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


class SeparateExperts(nn.Module):
    """A whole MoE layer (T, D) -> (T, D) as a loop over eight modules; their weights are random."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 8, bias=False), nn.ModuleList(_Expert() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, 16) float."""
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def tiny() -> nn.Module:
    """The zoo's deepseek-moe-tiny, which every test may change."""
    return build("deepseek-moe-tiny")


def tokens(*size: int, vocabulary: int = 512, seed: int = 0) -> Tensor:
    """Random ids of that shape."""
    return torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    """max|actual − expected| / max|expected|; 0 for empty tensors of one shape."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max()).item()
