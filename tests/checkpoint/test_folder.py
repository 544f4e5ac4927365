"""A folder's checkpoint: the index and the shards agree, or one line says where they do not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.folder import holds_safetensors, open_checkpoint

SHARDS = {"first.safetensors": ("a", "b"), "second.safetensors": ("c",)}
PLACES = {name: file for file, names in SHARDS.items() for name in names}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file, names in SHARDS.items():
        save_file({name: torch.ones(3) for name in names}, tmp_path / file)
    return index(tmp_path, PLACES)


def index(folder: Path, places: object) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "HERE")


def test_the_shards_that_the_index_names(folder: Path) -> None:
    save_file({"else": torch.ones(3)}, folder / "adapter.safetensors")  # of another model
    assert {name: tensor.file.name for name, tensor in open_checkpoint(folder).items()} == PLACES


def test_another_index_serves_as_well(folder: Path) -> None:
    (folder / "model.safetensors.index.json").rename(folder / "weights.safetensors.index.json")
    assert open_checkpoint(folder).keys() == PLACES.keys()
    (folder / "more.safetensors.index.json").write_text("{}")
    assert refused(folder).startswith("HERE: more than one index (more.safetensors.index.json, weights.")
    (folder / "more.safetensors.index.json").rename(folder / "model.safetensors.index.json")
    assert "has no weight_map" in refused(folder)


def test_one_file_goes_before_an_index(folder: Path) -> None:
    save_file({"whole": torch.ones(3)}, folder / "model.safetensors")
    assert open_checkpoint(folder).keys() == {"whole"}


def test_what_a_folder_holds(tmp_path: Path) -> None:
    assert not holds_safetensors(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert holds_safetensors(tmp_path)
    assert refused(tmp_path) == "HERE: neither model.safetensors nor an index of its .safetensors files"
    (tmp_path / "weights.safetensors").rename(tmp_path / "a.safetensors.index.json")
    assert holds_safetensors(tmp_path)


def test_a_link_to_nowhere_is_a_file_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs")
    assert holds_safetensors(tmp_path)
    assert refused(tmp_path) == "HERE/model.safetensors: no such file"


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (None, "index.json: has no weight_map that names tensors and their files"),
        ({}, "index.json: has no weight_map"),
        (PLACES | {"c": 3}, "index.json: c is in 3, which is no .safetensors file beside it"),
        (PLACES | {"c": "../second.safetensors"}, "c is in '../second.safetensors', which is no"),
        (PLACES | {"c": "/second.safetensors"}, "c is in '/second.safetensors', which is no"),
        (PLACES | {"c": "second.bin"}, "c is in 'second.bin', which is no .safetensors file"),
        (PLACES | {"d": "third.safetensors"}, "HERE/third.safetensors: no such file, but "
         "model.safetensors.index.json places d there; fetch it too"),
        (PLACES | {"d": "first.safetensors"}, "HERE/first.safetensors: lacks d, which "
         "model.safetensors.index.json places there"),
        (PLACES | {"a": "second.safetensors"}, "HERE/second.safetensors: lacks a, which is in "
         "first.safetensors"),
        ({"a": "first.safetensors", "c": "second.safetensors"}, "HERE/first.safetensors: holds b, which "
         "model.safetensors.index.json does not name"),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_refused(folder: Path, places: object, says: str) -> None:
    assert says in refused(index(folder, places))


def test_an_index_that_is_damaged(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert "index.json: is not JSON" in refused(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b", "a": "c"}}')
    assert "index.json: names 'a' twice; fetch the file again" in refused(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    save_file({"a": torch.ones(3), "c": torch.ones(3)}, folder / "second.safetensors")
    assert refused(folder).startswith("HERE/second.safetensors: holds a, and so does first.safetensors")


def test_a_damaged_shard_is_named(folder: Path) -> None:
    content = (folder / "second.safetensors").read_bytes()
    (folder / "second.safetensors").write_bytes(content[:-1])
    assert refused(folder).startswith("HERE/second.safetensors: cut off: c reaches byte")
