"""Tensors for a file, and back: memory that several of them share is written once and shared again.

A tensor is a window on a storage: tied weights are one tensor under two names, packed experts are windows on
one storage. Written is, of every storage, the span that windows look at; what a storage holds beyond it
belongs to nobody.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNED = 64  # a span begins at such an address: a multiple of every element's size
_PIECE = 1 << 30  # bytes moved from a GPU at a time


@dataclass(frozen=True)
class Window:
    """A tensor on span number `span`: the element it begins at, its sizes and strides in elements."""

    span: int
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    parameter: bool
    requires_grad: bool


@dataclass(frozen=True)
class Span:
    """Bytes of one storage from `start` on, on a device."""

    device: str
    start: int
    size: int


@dataclass(frozen=True)
class Plan:
    """Which spans to write, the windows on them, and by what names the windows go."""

    spans: tuple[Span, ...]
    windows: tuple[Window, ...]
    names: Mapping[str, int]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> tuple[Plan, list[torch.UntypedStorage]]:
        """The plan for these tensors, and the storages its spans lie in."""
        own = {name: _unconjugated(t) for name, t in tensors.items()}
        distinct = list({id(t): t for t in own.values()}.values())
        reach = dict[tuple[str, int], tuple[int, int]]()
        storages = dict[tuple[str, int], torch.UntypedStorage]()
        for t in sorted(distinct, key=lambda t: not t.numel()):  # an empty one looks at nothing
            low, high = reach.setdefault(_place(t), _reach(t))
            if t.numel():
                reach[_place(t)] = (min(low, _reach(t)[0]), max(high, _reach(t)[1]))
            storages[_place(t)] = t.untyped_storage()
        spans = tuple(Span(device, low, high - low) for (device, _), (low, high) in reach.items())
        number = {place: i for i, place in enumerate(reach)}
        windows = tuple(_window(t, number[_place(t)], reach[_place(t)][0]) for t in distinct)
        order = {id(t): i for i, t in enumerate(distinct)}
        return Plan(spans, windows, {name: order[id(t)] for name, t in own.items()}), list(storages.values())

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Plan:
        """From what `dataclasses.asdict` made of a plan."""
        spans = tuple(Span(**span) for span in record["spans"])
        windows = tuple(
            Window(**{**window, "size": tuple(window["size"]), "stride": tuple(window["stride"])})
            for window in record["windows"]
        )
        return Plan(spans, windows, dict(record["names"]))

    def tensors(self, spans: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors by their names, given each span's bytes on the CPU."""
        moved = [t.to(span.device).untyped_storage() for t, span in zip(spans, self.spans, strict=True)]
        built = [_built(window, moved[window.span]) for window in self.windows]
        return {name: built[i] for name, i in self.names.items()}


def plain(value: object) -> bool:
    """Whether a value is a tensor whose numbers lie in an ordinary storage."""
    return (
        isinstance(value, Tensor)
        and type(value.data) is Tensor
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def content(span: Span, storage: torch.UntypedStorage) -> Iterator[memoryview]:
    """The bytes of a span, in pieces."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    for start in range(span.start, span.start + span.size, _PIECE):
        piece = whole[start : min(start + _PIECE, span.start + span.size)].cpu()
        yield memory(piece)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; valid while the tensor lives."""
    if not tensor.nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _unconjugated(t: Tensor) -> Tensor:
    """Conjugation and negation may be mere flags, which a storage does not know."""
    return t.resolve_conj().resolve_neg() if t.is_conj() or t.is_neg() else t


def _place(t: Tensor) -> tuple[str, int]:
    return str(t.device), t.untyped_storage().data_ptr()


def _reach(t: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor looks at: from, and up to."""
    if not t.numel():
        return 0, 0
    low = int(t.storage_offset()) * t.itemsize
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return low // _ALIGNED * _ALIGNED, low + (int(last) + 1) * t.itemsize


def _window(t: Tensor, span: int, start: int) -> Window:
    offset = int(t.storage_offset()) - start // t.itemsize if t.numel() else 0
    dtype = str(t.dtype).removeprefix("torch.")
    return Window(
        span,
        dtype,
        offset,
        tuple(t.shape),
        t.stride(),
        isinstance(t, nn.Parameter),
        t.requires_grad and t.is_leaf,
    )


def _built(window: Window, storage: torch.UntypedStorage) -> Tensor:
    dtype = getattr(torch, window.dtype)
    bare = torch.empty(0, dtype=dtype, device=storage.device)
    tensor = bare.set_(storage, window.offset, window.size, window.stride)
    if window.parameter:
        return nn.Parameter(tensor, requires_grad=window.requires_grad)
    return tensor.requires_grad_(window.requires_grad)
