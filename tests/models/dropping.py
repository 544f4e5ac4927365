"""What tests of layers that drop tokens share: experts in vectors and sums, tokens that choose alike."""

import torch
from torch import Tensor

from dsmoe_compiler.models.stacked_experts import StackedExperts


def expert(experts: StackedExperts, index: int, x_D: Tensor) -> Tensor:
    """One expert's answer to one token, (D,) float64."""
    gate, up = (experts.gate_up_proj[index].double() @ x_D.double()).chunk(2)
    return experts.down_proj[index].double() @ (gate / (1 + torch.exp(-gate)) * up)


def answers(experts: StackedExperts, x_SD: Tensor, weights_SE: list[list[float]]) -> Tensor:
    """Σ_e weights[s][e] · FFN_e(x[s]) for every token s of a group, (S, D) float64."""
    rows = []
    for x_D, weights_E in zip(x_SD, weights_SE, strict=True):
        row = torch.zeros_like(x_D, dtype=torch.float64)
        for index, weight in enumerate(weights_E):
            if weight:
                row += weight * expert(experts, index, x_D)
        rows.append(row)
    return torch.stack(rows)


def alike(groups: int, tokens: int, width: int) -> Tensor:
    """Tokens (G, S, D) that lean in one direction, so that experts are chosen unevenly."""
    generator = torch.Generator().manual_seed(1)  # another than the weights': nobody's row
    towards = torch.randn(width, generator=generator)
    return 0.5 * towards + torch.randn(groups, tokens, width, generator=generator)
