"""Top-k by counting, for what lowers to linalg."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MOST = 1024  # scores a row; beyond it, comparing each with each costs more than a sort


def rank_topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """`aten.topk` as every score's rank: how many of its row come before it. Of equal ones the first does.

        x            0.1  0.7  0.2  0.7
        rank           3    0    2    1
        values, ids  (0.7, 0.7), (1, 3)    for k=2

    torch-mlir itself makes a top-k a `tm_tensor.sort` in place, an operator of its own dialect, which MLIR's
    tools do not parse; and IREE's compiler (3.13) lets two sorts in one program share the buffer of their
    first ids, so that the second starts from what the first left. NotImplemented, and so torch-mlir's way,
    along another dimension than the last, of a size that varies or of too many.
    """
    along = dim % max(x.dim(), 1)
    count = x.shape[along] if x.dim() else 0
    if not isinstance(count, int) or not 1 <= k <= count <= _MOST or along != x.dim() - 1:
        return NotImplemented
    place = torch.arange(count, device=x.device)
    other, own = x.unsqueeze(-2), x.unsqueeze(-1)
    ahead = other > own if largest else other < own
    tied = (other == own) & (place < place.unsqueeze(-1))
    rank = (ahead | tied).sum(-1)
    chosen = rank.unsqueeze(-2) == torch.arange(k, device=x.device).unsqueeze(-1)
    # The largest, not the sum: with NaN several scores have one rank, and an id stays an id.
    ids = torch.where(chosen, place, torch.zeros_like(place)).amax(-1)
    return x.gather(-1, ids), ids
