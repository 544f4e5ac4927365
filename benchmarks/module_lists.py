"""Mixture-of-Experts layers with a `ModuleList` of experts, as people write them outside libraries."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOP_K = 2


class Expert(nn.Module):
    """SwiGLU with three tensors of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Layer(nn.Module):
    """A router over E experts; subclasses run them."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """weights and ids (T, K)."""
        logits, ids = self.gate(x).topk(TOP_K, dim=-1)
        return logits.softmax(-1), ids


class Visited(Layer):
    """A loop over the experts, their tokens found by `where`."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


class Masked(Layer):
    """A loop over the experts that have tokens, found by a mask."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            mask = chosen.any(-1)
            if mask.any():
                out[mask] += (weights * chosen).sum(-1)[mask].unsqueeze(-1) * expert(x[mask])
        return out


class Segmented(Layer):
    """Rows sorted by expert, cut by counts that are read on the host, as DeepSeek's inference code does."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        weights, ids = self.route(x)
        counts = ids.new_zeros((ids.shape[0], len(self.experts))).scatter_(1, ids, 1).sum(0)
        order = ids.view(-1).argsort()
        rows, parts, start = x[order // TOP_K], list[Tensor](), 0
        for e, n in enumerate(counts.cpu().numpy()):
            if n == 0:
                continue
            parts.append(self.experts[e](rows[start : start + n]))
            start += n
        y = torch.cat(parts)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


class Network(nn.Module):
    """Residual layers of one kind."""

    def __init__(
        self, kind: Callable[[int, int, int], Layer], layers: int, width: int, hidden: int, experts: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(width, hidden, experts) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        for layer in self.layers:
            x = x + layer(x)
        return x


SPELLINGS: dict[str, Callable[[int, int, int], Layer]] = {
    "visited": Visited,
    "masked": Masked,
    "segmented": Segmented,
}
