"""One layer with all that an adversary needs: a router, stacked experts twice, separate experts, tables.

T tokens, D model width, F expert hidden width, E experts, K experts per token, P = T·K pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tests.passes.loops import SwiGLU
from tests.passes.spellings import SWIGLU, Experts, Gemm, SharedExpert, Sizes

D, F_, E, K = 8, 6, 4, 2
SIZES = Sizes(D, F_, E, K)
Outputs: TypeAlias = "Tensor | Sequence[Outputs]"
Run: TypeAlias = Callable[..., Any]


class Adversary(nn.Module):
    """`run(layer, x (T, D), …)` is the forward: whatever a case makes of the parts."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.gate = nn.Linear(D, E, bias=False)
        self.experts, self.other = (Experts(SWIGLU, SIZES, transposed=False) for _ in range(2))
        self.each = nn.ModuleList(SwiGLU(F_) for _ in range(E))
        self.shared = SharedExpert(SIZES, gated=False)
        self.table = nn.Buffer(torch.tensor([2, 0, 3, 1]))
        self.halves = nn.Buffer(torch.tensor([0, 0, 1, 1]))
        self.gain = nn.Buffer(torch.ones(()))
        for e in range(E):
            self.register_buffer(f"own_{e}", torch.randn(D, D))
        self.half_gate = nn.Linear(D, 2, bias=False)
        self.fine_gate = nn.Parameter(torch.zeros(E, D, dtype=torch.float64))

    def forward(self, *args: Tensor) -> Outputs:
        found: Outputs = self.run(self, *args)
        return found

    def scores(self, x: Tensor) -> Tensor:
        """(T, E)."""
        found: Tensor = self.gate(x).softmax(-1)
        return found

    def route(self, x: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
        """weights (T, K), ids (T, K)."""
        weights, ids = self.scores(x).topk(k, dim=-1)
        return weights, ids


def layer(run: Run) -> Adversary:
    """The layer with weights that depend on nothing."""
    torch.manual_seed(0)
    made = Adversary(run)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval().requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """A layer's forward, the inputs it takes for T tokens, how many layers it has, and what refuses it (or,
    where `router`, its router): a code and words of the reason.
    """

    run: Run
    inputs: Callable[[int], tuple[Tensor, ...]] = lambda tokens: (torch.randn(tokens, D),)
    layers: int = 1
    refused: str = ""
    because: str = ""
    router: bool = False

    def __str__(self) -> str:
        run = self.run
        return run.__name__ if not isinstance(run, partial) else f"{run.func.__name__}-{run.keywords['kind']}"


def with_ids(tokens: int) -> tuple[Tensor, ...]:
    """x and ids (T, K) from elsewhere."""
    return torch.randn(tokens, D), torch.randint(0, E, (tokens, K))


def with_words(tokens: int) -> tuple[Tensor, ...]:
    """x and the words (T,) that the tokens are."""
    return torch.randn(tokens, D), torch.randint(0, 1000, (tokens,))


def of_pairs(experts: Experts, flat: Tensor) -> Gemm:
    """Products of each pair's row with its own expert's weights."""
    return lambda name, rows: torch.bmm(experts.get_parameter(name)[flat], rows.unsqueeze(-1)).squeeze(-1)


def everywhere(experts: Experts, x: Tensor) -> Tensor:
    """(E, T, D): what every expert gives for every token."""
    rows = x.unsqueeze(0).expand(experts.count, -1, -1)
    return experts.body.run(rows, lambda name, rows: torch.bmm(rows, experts.in_out(name)))


def visited(m: Adversary, x: Tensor, ids: Tensor, weights: Tensor, experts: Any = None) -> Tensor:
    """A loop over separate experts."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts or m.each):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
    return out
