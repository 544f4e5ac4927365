"""What code generation knows of a tensor: how it lies in memory, never its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Operand:
    """A tensor's sizes and strides (in elements), dtype ("bfloat16"), and whether it begins at 16 bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    aligned: bool = True

    @property
    def rows(self) -> int:
        """The stride from one of an expert's rows to the next."""
        return self.strides[-2]

    @property
    def is_dense(self) -> bool:
        """Whether numbers of a row are neighbours."""
        return self.strides[-1] == 1 or self.shape[-1] == 1

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return prod(self.shape) * SIZES[self.dtype]

    @property
    def allows_descriptor(self) -> bool:
        """Whether a tensor memory accelerator can read it: rows and beginning at multiples of 16 bytes."""
        size = SIZES[self.dtype]
        steps = [s * size for s in self.strides[:-1]]
        return self.aligned and self.strides[-1] == 1 and all(s > 0 and s % 16 == 0 for s in steps)


SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
