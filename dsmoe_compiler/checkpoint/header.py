"""The header of a safetensors file, read and held against the file's size before any tensor is.

    8 bytes        N, little-endian
    N bytes        {"NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …}
    the rest       the tensors' bytes, row-major, without gaps; offsets count from here

Source: the format's description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe_compiler.checkpoint.errors import CheckpointError, damaged
from dsmoe_compiler.checkpoint.strict_json import parse_object

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; its row-major bytes begin `start` bytes after the file does."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes; none of these is read.

    Raises CheckpointError when the file cannot be read, its header is no header, or the tensors are not,
    side by side, what the rest of the file is.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'is no ordinary file' if path.exists() else 'no such file'}")
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if end < _LENGTH_BYTES:
                raise damaged(path, f"a file of {end} bytes has no header")
            if length > min(end - _LENGTH_BYTES, _LONGEST_HEADER):
                raise damaged(path, f"a header of {length:,} bytes does not fit in a file of {end:,}")
            text = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e
    try:
        fields = parse_object(text)
    except ValueError as e:
        raise damaged(path, f"its header {e}") from e
    fields.pop("__metadata__", None)  # says nothing of the tensors
    data = _LENGTH_BYTES + length
    tensors = [_tensor(path, name, record, data) for name, record in fields.items()]
    tensors.sort(key=lambda each: (each.start, each.size))
    _require_side_by_side(path, tensors, data, end)
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, record: object, data: int) -> StoredTensor:
    if not isinstance(record, Mapping) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"its header does not describe {name} by dtype, shape and data_offsets")
    kind, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not name.isprintable():
        raise damaged(path, f"its header names a tensor {name!a}")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: {name} has dtype {kind!r}, which is none of {', '.join(_DTYPES)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise damaged(path, f"{name} has shape {shape!r} and data_offsets {offsets!r}")
    start, stop = offsets
    tensor = StoredTensor(path, name, dtype, tuple(shape), data + start)
    if stop - start != tensor.size:
        raise damaged(
            path,
            f"{name} has {stop - start:,} bytes, but its shape {list(shape)} of {kind} takes {tensor.size:,}",
        )
    return tensor


def _sizes(value: object) -> bool:
    """Whether a value of JSON is a list of integers from 0 on; true and 1.0 are none."""
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _require_side_by_side(path: Path, tensors: list[StoredTensor], data: int, end: int) -> None:
    """Without overlaps and gaps, from the header's end to the file's."""
    reached, before = data, "the header"
    for tensor in tensors:
        if tensor.start < reached:
            raise damaged(path, f"{tensor.name} overlaps {before} by {reached - tensor.start:,} bytes")
        if tensor.start > reached:
            gap = tensor.start - reached
            raise damaged(path, f"{gap:,} bytes between {before} and {tensor.name} are no tensor's")
        reached, before = tensor.start + tensor.size, tensor.name
    if reached > end:
        raise damaged(path, f"cut off: {before} reaches byte {reached:,} in a file of {end:,}")
    if reached < end:
        raise damaged(path, f"{end - reached:,} bytes after {before} are no tensor's")
