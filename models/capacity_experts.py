"""Experts with room for so many tokens of each group, reached by one-hot products (GShard, arXiv 2006.16668).

Shapes: G groups of S tokens (a group is a sequence: B groups of L), D model width, F expert hidden width,
E experts, C places that an expert has for a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_compiler.models.stacked_experts import StackedExperts


class CapacityExperts(StackedExperts):
    """Stacked experts, each on the C tokens of a group that found room with it."""

    def forward(self, x_GSD: Tensor, combine_GSEC: Tensor) -> Tensor:
        """Combine the answers of the experts that each token sits with; 0 for a token without a place.

        x_GSD: any float dtype, also the result's. combine_GSEC: float32, a token's weight with an expert, at
        its place, and 0 elsewhere. Products with it are summed in the wider of the two dtypes.
        """
        dispatch_GSEC = (combine_GSEC != 0).to(x_GSD.dtype)
        x_EGCD = torch.einsum("gsec,gsd->egcd", dispatch_GSEC, x_GSD)
        gate_EGCF, up_EGCF = torch.einsum("egcd,efd->egcf", x_EGCD, self.gate_up_proj).chunk(2, dim=-1)
        y_GECD = torch.einsum("egcf,edf->gecd", F.silu(gate_EGCF) * up_EGCF, self.down_proj)
        out_GSD = torch.einsum("gsec,gecd->gsd", combine_GSEC, y_GECD.to(combine_GSEC.dtype))
        return out_GSD.to(x_GSD.dtype)


def places(chosen_GSE: Tensor) -> Tensor:
    """How many earlier tokens of the group chose each expert, (G, S, E) from one-hot choices."""
    return chosen_GSE.cumsum(dim=1) - chosen_GSE


def seat(weight_GS: Tensor, chosen_GSE: Tensor, place_GS: Tensor, capacity: int) -> Tensor:
    """Each token's weight at its expert's place, (G, S, E, C); 0 all over where the place is beyond C."""
    found_room_GS = place_GS < capacity
    place_GSC = F.one_hot(place_GS.clamp(max=capacity - 1), capacity)
    return torch.einsum(
        "gs,gse,gsc->gsec",
        weight_GS * found_room_GS,
        chosen_GSE.to(weight_GS.dtype),
        place_GSC.to(weight_GS.dtype),
    )
