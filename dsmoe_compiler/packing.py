"""Tensors of separate experts as one tensor, without a second copy.

A `ModuleList` of experts holds E small tensors where the fused op reads one with the experts first. They are
copied once into one storage and re-pointed to it (`parameter.data`), one weight after the other: the user's
module keeps its parameters and their values, what is loaded or trained in place shows on both sides, and no
more than one packed weight is alive beside its originals at any time.

Tensors that share memory with others are left alone: re-pointing one of them would break what they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def packed(parts: Sequence[Tensor]) -> Tensor | None:
    """The (E, …) tensor that the parts are views of, in their order; None where they lie apart.

    The same tensor in every place is read E times from one memory.
    """
    first = parts[0]
    if all(p is first for p in parts):
        return first.detach().unsqueeze(0).expand(len(parts), *first.shape)
    storage, start, stride = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    for e, part in enumerate(parts):
        together = part.untyped_storage().data_ptr() == storage and part.is_contiguous()
        if not together or part.storage_offset() != start + e * stride:
            return None
    return first.detach().as_strided((len(parts), *first.shape), (stride, *first.stride()), start)


def pack(parts: Sequence[Tensor], program: Iterable[Any] = ()) -> Tensor | None:
    """The parts as one tensor, brought together in memory if they lie apart; None where that would break
    memory that they share with each other or with other tensors of the `program`.
    """
    together = packed(parts)
    if together is not None or not _own_their_memory(parts, program):
        return together
    first = parts[0]
    made = torch.empty((len(parts), *first.shape), dtype=first.dtype, device=first.device)
    with torch.no_grad():
        for e, part in enumerate(parts):
            made[e].copy_(part)
            part.data = made[e]
    return made


def _own_their_memory(parts: Sequence[Tensor], program: Iterable[Any]) -> bool:
    """Whether each part is all there is in its storage, and nothing else of the program is."""
    plain = all(type(p) in (Tensor, nn.Parameter) and p.is_contiguous() for p in parts)
    if not plain or len({id(p) for p in parts}) < len(parts):
        return False
    if any(p.is_inference() or p.untyped_storage().is_shared() for p in parts):
        return False
    if any(p.untyped_storage().nbytes() != p.numel() * p.element_size() for p in parts):
        return False
    holders = dict[int, set[int]]()
    for tensor in (*parts, *program):
        if isinstance(tensor, Tensor) and tensor.numel():
            holders.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
    return all(len(holders.get(p.untyped_storage().data_ptr(), ())) == 1 for p in parts)


class Packed(nn.Module):
    """`dsmoe::pack` of a lowered program: a view where the parts lie together, else a copy at each call."""

    def __init__(self, parts: Sequence[Tensor], program: Iterable[Any] = ()) -> None:
        super().__init__()
        self._parts = tuple(parts)
        self._whole = pack(self._parts, program)

    def forward(self) -> Tensor:
        """(E, …); gradients flow to the parts."""
        whole = self._whole
        if whole is None or whole.data_ptr() != self._parts[0].data_ptr() or self._last_moved(whole):
            whole = self._whole = packed(self._parts)
        if whole is None:
            return torch.stack(self._parts)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._parts):
            return _Whole.apply(whole, *self._parts)  # type: ignore[no-any-return, no-untyped-call]
        return whole

    def _last_moved(self, whole: Tensor) -> bool:
        """Whether the last part lies elsewhere, or has another dtype, since they were brought together."""
        last = self._parts[-1]
        return whole[-1].data_ptr() != last.data_ptr() or whole.dtype != last.dtype


class _Whole(torch.autograd.Function):
    """The packed tensor as a function of its parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *gradient.unbind(0))
