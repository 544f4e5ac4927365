"""Ways in which a checkpoint comes to harm, each at a place that a generator chooses."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def _shard(folder: Path, random: Random) -> Path:
    return random.choice(sorted(folder.glob("*.safetensors")))


def _rewrite(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def _index(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def _replace_in_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Whoever renames or removes a tensor with a tool does so in the index, too."""
    path, index = _index(folder)
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    size = random.randrange(file.stat().st_size)
    file.write_bytes(file.read_bytes()[:size])
    return f"{file.name} cut off after {size} bytes"


def empty_file(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    file.write_bytes(b"")
    return f"{file.name} empty"


def lengthen(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    file.write_bytes(file.read_bytes() + random.randbytes(random.randint(1, 99)))
    return f"bytes after {file.name}"


def flip_header(folder: Path, random: Random) -> str:
    """One byte of a header is another one.

    Where the file then still says the same of every tensor, it is drawn again: nobody can see a change in
    the space that fills a header up, or in `__metadata__`, which says nothing of the tensors. Nor could one
    be seen in the tensors' own bytes, for which the format has no digest; these are left alone.
    """
    file = _shard(folder, random)
    content, before = file.read_bytes(), _said(file)
    end = 8 + int.from_bytes(content[:8], "little")
    while True:
        place, other = random.randrange(end), random.randrange(1, 256)
        damaged = bytearray(content)
        damaged[place] ^= other
        file.write_bytes(damaged)
        if _said(file) != before:
            return f"byte {place} of {file.name}: {content[place]:#x} became {damaged[place]:#x}"


def _said(file: Path) -> list[tuple[str, str, list[int], bytes]] | None:
    """What the safetensors library reads out of a file; None when it does not."""
    try:
        with safe_open(file, "pt") as opened:
            kinds = [(name, opened.get_slice(name)) for name in sorted(opened.keys())]
        tensors = load_file(file)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError):
        return None
    return [
        (
            name,
            kind.get_dtype(),
            kind.get_shape(),
            bytes(tensors[name].reshape(-1).view(torch.uint8).tolist()),
        )
        for name, kind in kinds
    ]


def rename_tensor(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    tensors = load_file(file)
    name = random.choice(sorted(tensors))
    place = random.randrange(len(name))
    other = name[:place] + random.choice("abcxyz_.019") + name[place + random.randint(0, 1) :]
    if other in _index(folder)[1]["weight_map"]:
        return rename_tensor(folder, random)
    tensors[other] = tensors.pop(name)
    _rewrite(file, tensors)
    _replace_in_index(folder, lambda places: places.update({other: places.pop(name)}))
    return f"{name} called {other}"


def remove_tensor(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    tensors = load_file(file)
    name = random.choice(sorted(tensors))
    del tensors[name]
    _rewrite(file, tensors)
    if random.random() < 0.5:
        return f"{name} removed from {file.name} only"
    _replace_in_index(folder, lambda places: places.pop(name))
    return f"{name} removed"


def add_tensor(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    tensors = load_file(file)
    name = f"model.layers.{random.randrange(9)}.mlp.experts.{random.randrange(9)}.bias"
    _rewrite(file, tensors | {name: torch.zeros(3)})
    if random.random() < 0.5:
        return f"{name} added to {file.name} only"
    _replace_in_index(folder, lambda places: places.update({name: file.name}))
    return f"{name} added"


def double_tensor(folder: Path, random: Random) -> str:
    one, other = random.sample(sorted(folder.glob("*.safetensors")), 2)
    name, tensor = random.choice(sorted(load_file(one).items()))
    _rewrite(other, load_file(other) | {name: tensor})
    return f"{name} in {one.name} and {other.name}"


def reshape_tensor(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    tensors = load_file(file)
    name = random.choice(sorted(tensors))
    shape = tensors[name].shape
    other = random.choice([(*shape, 1), (*shape[:-1], shape[-1] + 1), (*shape[:-1], shape[-1] - 1), (1, 1)])
    _rewrite(file, tensors | {name: torch.zeros(other)})
    return f"{name} is {list(other)} instead of {list(shape)}"


def integers(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    tensors = load_file(file)
    name = random.choice(sorted(tensors))
    _rewrite(file, tensors | {name: tensors[name].to(torch.int16)})
    return f"{name} is of integers"


def remove_shard(folder: Path, random: Random) -> str:
    file = _shard(folder, random)
    file.unlink()
    return f"{file.name} removed"


def misname_shard(folder: Path, random: Random) -> str:
    _, index = _index(folder)
    name = random.choice(sorted(index["weight_map"]))
    other = random.choice(["model-99999.safetensors", "", "../model.safetensors", "config.json", None])
    _replace_in_index(folder, lambda places: places.update({name: other}))
    return f"{name} in {other!r}"


def misplace_tensor(folder: Path, random: Random) -> str:
    _, index = _index(folder)
    name, file = random.choice(sorted(index["weight_map"].items()))
    other = random.choice(sorted(set(index["weight_map"].values()) - {file}))
    _replace_in_index(folder, lambda places: places.update({name: other}))
    return f"{name} in {other} says the index, and is in {file}"


def break_index(folder: Path, random: Random) -> str:
    path, _ = _index(folder)
    content = path.read_bytes()
    size = random.randrange(len(content))
    path.write_bytes(content[:size])
    return f"index cut off after {size} bytes"


def break_config(folder: Path, random: Random) -> str:
    path = folder / "config.json"
    content = path.read_bytes()
    size = random.randrange(len(content.rstrip()))
    path.write_bytes(content[:size])
    return f"config.json cut off after {size} bytes"


def other_config(folder: Path, random: Random) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    sizes = ["hidden_size", "num_hidden_layers", "vocab_size", "moe_intermediate_size"]
    name = random.choice([*sizes, "model_type"])
    config[name] = random.choice([None, "many", -1, 0, [], 3 * config[name]])
    path.write_text(json.dumps(config))
    return f"config.json: {name} is {config[name]!r}"


HARMS = (
    truncate,
    flip_header,
    rename_tensor,
    empty_file,
    lengthen,
    truncate,
    flip_header,
    remove_tensor,
    add_tensor,
    double_tensor,
    reshape_tensor,
    integers,
    truncate,
    flip_header,
    rename_tensor,
    remove_shard,
    misname_shard,
    misplace_tensor,
    break_index,
    break_config,
    other_config,
)


def corrupt(folder: Path, seed: int) -> str:
    """Harm a folder with shards, in the next of these ways and at places that the seed gives; say how."""
    return HARMS[seed % len(HARMS)](folder, Random(seed))
