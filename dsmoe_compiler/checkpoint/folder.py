"""A folder's checkpoint: one safetensors file, or shards and the index that names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.header import StoredTensor, read_header
from dsmoe_compiler.checkpoint.strict_json import parse_object

_SINGLE = "model.safetensors"
_INDEX = ".safetensors.index.json"


def holds_safetensors(folder: Path) -> bool:
    """Whether the folder has a safetensors file or an index of some, whole or damaged."""
    return any(True for _ in folder.glob("*.safetensors")) or bool(_indexes(folder))


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's checkpoint by name, from the headers alone.

    `model.safetensors` where there is one, else the shards of the index. Raises CheckpointError for damaged
    headers, and for an index and shards that do not agree on which tensor is where.
    """
    single, indexes = folder / _SINGLE, _indexes(folder)
    if single.exists() or single.is_symlink():
        return read_header(single)
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes)
        raise CheckpointError(f"{folder}: more than one index ({names}); leave the one that is meant")
    if not indexes:
        raise CheckpointError(f"{folder}: neither {_SINGLE} nor an index of its .safetensors files")
    return _sharded(indexes[0])


def _indexes(folder: Path) -> list[Path]:
    """The folder's indexes; transformers' own name stands for all where it is there."""
    found = sorted(folder.glob(f"*{_INDEX}"))
    usual = [index for index in found if index.name == f"model{_INDEX}"]
    return usual or found


def _sharded(index: Path) -> dict[str, StoredTensor]:
    places = dict(_weight_map(index))
    tensors = dict[str, StoredTensor]()
    for shard in sorted(set(places.values())):
        path = index.with_name(shard)
        if not path.exists():
            name = next(name for name, place in places.items() if place == shard)
            raise CheckpointError(f"{path}: no such file, but {index.name} places {name} there; fetch it too")
        header = read_header(path)
        for name, tensor in header.items():
            if name in tensors:
                other = tensors[name].file.name
                raise CheckpointError(f"{path}: holds {name}, and so does {other}; one of them is no shard")
            if name not in places:
                raise CheckpointError(f"{path}: holds {name}, which {index.name} does not name")
            tensors[name] = tensor
    _require_in_place(index, places, tensors)
    return tensors


def _weight_map(index: Path) -> Iterator[tuple[str, str]]:
    """(tensor, file name of its shard)."""
    try:
        content = parse_object(index.read_bytes())
    except ValueError as e:
        raise CheckpointError(f"{index}: {e}; fetch the file again") from e
    except OSError as e:
        raise CheckpointError(f"{index}: cannot be read ({e.strerror or e})") from e
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map that names tensors and their files")
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or PurePath(shard).name != shard:
            raise CheckpointError(f"{index}: {name} is in {shard!r}, which is no .safetensors file beside it")
        yield name, shard


def _require_in_place(index: Path, places: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, shard in places.items():
        if name not in tensors:
            raise CheckpointError(f"{index.with_name(shard)}: lacks {name}, which {index.name} places there")
        if tensors[name].file.name != shard:
            found = tensors[name].file.name
            raise CheckpointError(f"{index.with_name(shard)}: lacks {name}, which is in {found}")
