"""Small layers before and after the passes: a stacked one, loops over few and many experts, a refused one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler import api
from dsmoe_compiler.anatomy.watch import Anatomist
from dsmoe_compiler.report.drawing.layer_graph import LayerAnatomy
from tests.passes import spellings
from tests.passes.spellings import ROUTERS, Spec, layer

D, FEW, MANY = 16, 5, 9


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, 8, bias=False), nn.Linear(D, 8, bias=False)
        self.w2 = nn.Linear(8, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Loop(nn.Module):
    """A loop over a ModuleList; with `strange`, an operator in it that no rule knows."""

    def __init__(self, experts: int, strange: bool = False) -> None:
        super().__init__()
        self.gate, self.strange = nn.Linear(D, experts, bias=False), strange
        self.experts, self.shared = nn.ModuleList(Expert() for _ in range(experts)), Expert()

    def forward(self, x_btD: Tensor) -> Tensor:
        x_TD = x_btD.reshape(-1, D)
        weights_TK, ids_TK = torch.topk(F.softmax(self.gate(x_TD), -1), 2, dim=-1)
        out_TD = torch.zeros_like(x_TD)
        chosen_EKT = F.one_hot(ids_TK, len(self.experts)).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slots, tokens = torch.where(chosen_EKT[e])
            y = expert(x_TD[tokens])
            if self.strange:
                y = torch.cumsum(y, -1)
            out_TD.index_add_(0, tokens, y * weights_TK[tokens, slots, None])
        out: Tensor = out_TD.reshape(x_btD.shape) + self.shared(x_btD)
        return out


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: layer(Spec(route=ROUTERS[2], shared="gated")),
    "gathered": lambda: layer(Spec(spellings.gathered, shared="plain")),
    "few": lambda: Loop(FEW),
    "many": lambda: Loop(MANY),
    "refused": lambda: Loop(FEW, strange=True),
}


@cache
def drawn(name: str) -> LayerAnatomy:
    """One of the layers, inspected once."""
    return inspected(name)


def inspected(name: str) -> LayerAnatomy:
    """One of the layers, inspected anew."""
    anatomist = Anatomist()
    report = api.inspect(LAYERS[name](), (torch.randn(2, 3, D),), instruments=(anatomist,))
    (found,) = report.layers
    return anatomist.layer(report, found.name)
