"""What a model's tensor is made of: a stored tensor, or one of float8 and the scales of its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.header import StoredTensor

SCALES = "_scale_inv"  # NAME_scale_inv holds what NAME's blocks are multiplied by
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class BlockScaled:
    """A float8 matrix [..., R, C], each block (rows, columns) of it to be multiplied by a scale of its own.

    `scales` is [..., ⌈R/rows⌉, ⌈C/columns⌉]: the last blocks of a row or column may be smaller.
    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2, 128 × 128.
    """

    values: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., R, C]."""
        return self.values.shape


Source: TypeAlias = StoredTensor | BlockScaled


def stored(source: Source) -> StoredTensor:
    """The tensor that goes by the model's name for it."""
    return source.values if isinstance(source, BlockScaled) else source


def main_dtype(sources: Mapping[str, Source]) -> torch.dtype:
    """The dtype of most bytes that are floats; bfloat16 where all are float8."""
    sizes = Counter[torch.dtype]()
    for source in sources.values():
        if isinstance(source, StoredTensor) and source.dtype.is_floating_point and source.dtype.itemsize > 1:
            sizes[source.dtype] += source.size
    return sizes.most_common(1)[0][0] if sizes else torch.bfloat16


def with_scales(tensors: Mapping[str, StoredTensor], block: tuple[int, int]) -> dict[str, Source]:
    """The tensors by name, every float8 one joined with its scales.

    Raises CheckpointError for a float8 tensor without scales, or with scales of another shape.
    """
    found = dict[str, Source]()
    for name, tensor in tensors.items():
        if tensor.dtype is FLOAT8:
            found[name] = _scaled(tensor, tensors.get(name + SCALES), block)
        elif not _scales_of_float8(name, tensors):
            found[name] = tensor
    return found


def _scales_of_float8(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    values = tensors.get(name.removesuffix(SCALES))
    return name.endswith(SCALES) and values is not None and values.dtype is FLOAT8


def _scaled(values: StoredTensor, scales: StoredTensor | None, block: tuple[int, int]) -> BlockScaled:
    if scales is None:
        raise CheckpointError(
            f"{values.file}: {values.name} is float8, and no {values.name}{SCALES} says its scales"
        )
    if len(values.shape) < 2:
        raise CheckpointError(f"{values.file}: {values.name} is float8, but no matrix: {list(values.shape)}")
    *stack, rows, columns = values.shape
    wanted = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    if scales.shape != wanted or not scales.dtype.is_floating_point:
        raise CheckpointError(
            f"{scales.file}: {scales.name} is {list(scales.shape)} of {scales.dtype}; blocks of "
            f"{block[0]} x {block[1]} of {list(values.shape)} need {list(wanted)} of floats"
        )
    return BlockScaled(values, scales, block)
