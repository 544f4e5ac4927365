"""The experts of a layer in a checkpoint: each of its tensors once for every expert, and all alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeAlias

from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.sources import Source, stored

_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..+)")


_Family: TypeAlias = dict[int, Source]  # by the expert's number, tensors of one name in one layer


def require_whole_families(sources: Mapping[str, Source]) -> None:
    """Raise CheckpointError unless the numbers in `….experts.N.…` run from 0 without a gap for each name in
    each layer, and the tensors of a name have one shape and dtype.

    Whoever stacks experts in the order of their names would else take one for another.
    """
    for (layer, kind), family in _families(sources).items():
        folder = stored(next(iter(family.values()))).file.parent
        for expert in range(max(family)):
            if expert not in family:
                raise CheckpointError(f"{folder}: lacks {layer}{expert}{kind}, but has that of {max(family)}")
        for expert, source in family.items():
            if _kind(source) != _kind(family[0]):
                raise CheckpointError(
                    f"{stored(source).file}: {layer}{expert}{kind} is {_told(source)}, "
                    f"and {_told(family[0])} for expert 0"
                )


def first_without_sibling(sources: Mapping[str, Source]) -> str | None:
    """The name that a last expert lacks, where another tensor of its layer is there for it."""
    families = _families(sources)
    for layer, kind in families:
        experts = max(len(family) for (other, _), family in families.items() if other == layer)
        if len(families[layer, kind]) < experts:
            return f"{layer}{len(families[layer, kind])}{kind}"
    return None


def _families(sources: Mapping[str, Source]) -> dict[tuple[str, str], _Family]:
    families = defaultdict[tuple[str, str], _Family](dict)
    for name, source in sources.items():
        if found := _EXPERT.fullmatch(name):
            if str(int(found[2])) != found[2]:
                raise CheckpointError(f"{stored(source).file}: {name} has no number that an expert has")
            families[found[1], found[3]][int(found[2])] = source
    return families


def _kind(source: Source) -> tuple[object, ...]:
    return source.shape, stored(source).dtype


def _told(source: Source) -> str:
    return f"{list(source.shape)} of {str(stored(source).dtype).removeprefix('torch.')}"
