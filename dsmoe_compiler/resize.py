"""Tensors at other sizes than the example's, to trace and to replay with."""

from __future__ import annotations

import torch
from torch import Tensor


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with another size along one dimension: its own values repeated, zeros where it had none."""
    if tensor.shape[dim] == size:
        return tensor
    if tensor.shape[dim] == 0:
        return tensor.new_zeros([size if d == dim else s for d, s in enumerate(tensor.shape)])
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
