"""The bytes of a tensor, wherever they are, and whether two tensors have the same: nothing is held whole."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from os.path import isfile
from pathlib import Path
from typing import Protocol

_PIECE = 4 << 20  # bytes compared at a time: tensors that differ mostly do so in the first
_UNSIGNED = {array(code).itemsize: code for code in "BHIQ"}  # by bytes


class Content(Protocol):
    """A tensor's bytes in row-major order, little-endian. Two that are equal are the very same bytes."""

    @property
    def available(self) -> bool:
        """Whether they can be read: a file may be missing, a tensor have no storage."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` up to `stop`."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """Bytes in memory."""

    data: bytes

    @property
    def available(self) -> bool:
        return True

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


@dataclass(frozen=True)
class InFile:
    """A part of a file, which may be missing or too short."""

    path: Path
    offset: int
    size: int

    @property
    def available(self) -> bool:
        # Unlike the path's own method, this one forgives impossible names.
        return isfile(self.path) and self.path.stat().st_size >= self.offset + self.size

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            return file.read(stop - start)


def same_content(a: Content, b: Content) -> bool:
    """Whether both hold the same bytes; read up to the first piece that differs. Raises OSError."""
    if a == b:
        return True
    if a.size != b.size:
        return False
    return all(x == y for x, y in zip(_pieces(a), _pieces(b), strict=True))


def same_turned(a: Content, b: Content, rows: int, columns: int) -> bool:
    """Whether a matrix of rows × columns and one of columns × rows are each other's transposes.

    The elements are of 1, 2, 4 or 8 bytes; a matrix without any is nobody's transpose. Raises OSError.
    """
    itemsize = a.size // (rows * columns) if rows * columns else 0
    code = _UNSIGNED.get(itemsize)
    if code is None or itemsize * rows * columns != a.size or a.size != b.size:
        return False
    # Corners stay where they are: of two that are no transposes little is read.
    if any(a.read(at, at + itemsize) != b.read(at, at + itemsize) for at in (0, a.size - itemsize)):
        return False
    numbers, length = array(code, a.read(0, a.size)), rows * itemsize
    step = max(1, _PIECE // length)
    return all(
        b.read(at * length, min(at + step, columns) * length)
        == b"".join(numbers[i::columns].tobytes() for i in range(at, min(at + step, columns)))
        for at in range(0, columns, step)
    )


def digest(content: Content) -> str:
    """Equal for equal bytes, and for no others. Raises OSError."""
    running = sha256()
    for piece in _pieces(content):
        running.update(piece)
    return running.hexdigest()


def _pieces(content: Content) -> Iterator[bytes]:
    for start in range(0, content.size, _PIECE):
        yield content.read(start, min(start + _PIECE, content.size))
