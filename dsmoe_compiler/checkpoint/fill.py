"""A model's memory filled from a checkpoint that holds just its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.reader import Reader
from dsmoe_compiler.checkpoint.sources import BlockScaled, Source, stored


def require_tensors(
    folder: Path, sources: Mapping[str, Source], wanted: Mapping[str, torch.Size], ignored: re.Pattern[str]
) -> None:
    """Raise CheckpointError unless the checkpoint has all tensors `wanted`, with these shapes and of floats,
    and no others but those whose names `ignored` is found in.
    """
    missing = [name for name in wanted if name not in sources]
    surplus = [name for name in sources if name not in wanted and not ignored.search(name)]
    require_same_names(folder, sources, missing, surplus)
    for name, shape in wanted.items():
        source = sources[name]
        if source.shape != shape:
            raise CheckpointError(
                f"{stored(source).file}: {name} is {list(source.shape)}, "
                f"and {list(shape)} in the model of config.json"
            )
        require_floats(source)


def require_same_names(
    folder: Path, sources: Mapping[str, Source], missing: Sequence[str], surplus: Sequence[str]
) -> None:
    """Raise CheckpointError when there is anything missing or surplus; of one renamed it tells both names."""
    held = f"holds {_several(surplus)}, which the model of config.json has not" if surplus else ""
    if missing:
        raise CheckpointError(f"{folder}: lacks {_several(missing)}" + (f", and {held}" if surplus else ""))
    if surplus:
        where = stored(sources[surplus[0]]).file if surplus[0] in sources else folder
        raise CheckpointError(f"{where}: {held}")


def _several(names: Sequence[str]) -> str:
    """Names for one line: the first, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def require_floats(source: Source) -> None:
    """Raise CheckpointError for a tensor of integers or truth values, which is no weight."""
    tensor = stored(source)
    if not isinstance(source, BlockScaled) and not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is of {tensor.dtype}, which is no float")


def fill(destinations: Mapping[str, Tensor], sources: Mapping[str, Source], reader: Reader) -> None:
    """Read every destination's tensor into it, in the order in which they lie in the files."""

    def place(name: str) -> tuple[Path, int]:
        tensor = stored(sources[name])
        return tensor.file, tensor.start

    for name in sorted(destinations, key=place):
        reader.fill(destinations[name], sources[name])
