"""Three small layers for the command line: one fuses whole, one but for its router, one not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Kind:
    """How a layer scores its experts, and what it does to an expert's hidden rows."""

    score: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _across_rows(rows: Tensor) -> Tensor:
    """Not an expert's maths: each row depends on those before it."""
    return F.silu(rows).cumsum(0)


class Layer(nn.Module):
    """(T, 16) -> (T, 16): top-2 of 8 experts, by gathered weights."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = ((8, 16), (8, 12, 16), (8, 16, 12))
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(size, generator=generator) * 0.3) for size in sizes
        )
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.kind.score(F.linear(x, self.gate)).topk(2)
        rows, pairs = x.repeat_interleave(2, 0), ids.reshape(-1)
        h = self.kind.activation(torch.bmm(self.up[pairs], rows.unsqueeze(-1)).squeeze(-1))
        y = torch.bmm(self.down[pairs], h.unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, y.shape[-1]).sum(1)


KINDS = (Kind(_softmax, F.silu), Kind(torch.tanh, F.silu), Kind(_softmax, _across_rows))


def build() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    """The layers one after the other, and a call of them."""
    return nn.Sequential(*map(Layer, KINDS)), (torch.ones(5, 16),), {}
