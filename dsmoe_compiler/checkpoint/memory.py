"""The bytes of a tensor, to be read into."""

from __future__ import annotations

import ctypes

from torch import Tensor


def writable_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, valid while it lives. Raises ValueError for others."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("only contiguous memory of the CPU can be read into")
    if not tensor.nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
