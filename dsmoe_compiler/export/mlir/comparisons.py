"""What a router sorts and scatters, said as comparisons.

torch-mlir makes a top-k a `tm_tensor.sort` and a scatter a `tm_tensor.scatter`: operators of a dialect of its
own, which MLIR's tools do not parse, and which write in place. IREE's compiler (3.13) gives two of them that
start from equal tensors one buffer, so that the second starts from what the first left. Comparisons are
linalg. Both functions decline with NotImplemented, and so leave torch-mlir its way, along another dimension
than the last, of a size that varies or of too many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MOST = 1024  # numbers a row; of more, comparing each with each costs more than a sort


def rank_topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """`aten.topk` by every number's rank: how many of its row come before it. Of equal ones the first does.

    x            0.1  0.7  0.2  0.7
    rank           3    0    2    1
    values, ids  (0.7, 0.7), (1, 3)    for k=2
    """
    count = _last(x, dim)
    if count is None or not 1 <= k <= count:
        return NotImplemented
    place = torch.arange(count, device=x.device)
    other, own = x.unsqueeze(-2), x.unsqueeze(-1)
    ahead = other > own if largest else other < own
    tied = (other == own) & (place < place.unsqueeze(-1))
    rank = (ahead | tied).sum(-1)
    chosen = rank.unsqueeze(-2) == torch.arange(k, device=x.device).unsqueeze(-1)
    # The largest, not the sum: with NaN several numbers have one rank, and an id stays an id.
    ids = torch.where(chosen, place, torch.zeros_like(place)).amax(-1)
    return x.gather(-1, ids), ids


def match_scatter(x: Tensor, dim: int, index: Tensor, value: float) -> Any:
    """`aten.scatter.value`: the value where any index of the row is the place's number.

    x, index  (0, 0, 0, 0), (3, 1)
    result    (0, v, 0, v)
    """
    count = _last(x, dim)
    if count is None or index.shape[:-1] != x.shape[:-1]:
        return NotImplemented
    hit = (index.unsqueeze(-1) == torch.arange(count, device=x.device)).any(-2)
    return torch.where(hit, torch.full_like(x, value), x)


def _last(x: Tensor, dim: int) -> int | None:
    """The size of x along `dim`; None where that is not the last dimension, or not a number up to _MOST."""
    if not x.dim() or dim % x.dim() != x.dim() - 1:
        return None
    count = x.shape[-1]
    return count if isinstance(count, int) and count <= _MOST else None
