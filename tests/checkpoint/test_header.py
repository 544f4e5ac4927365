"""A safetensors file's header: what is in it, and every way in which it can lie."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.header import read_header

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def written(path: Path, header: dict[str, Any] | bytes, data: int = 32) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_what_the_library_writes_is_read(file: Path) -> None:
    tensors = {
        "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "nothing": torch.empty(0, 5),
        "nothing more": torch.empty(5, 0),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    found, content = read_header(file), file.read_bytes()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.name, stored.file) == (name, file)
        assert (stored.dtype, stored.shape, stored.size) == (tensor.dtype, tensor.shape, tensor.nbytes)
        if tensor.numel():
            raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)[stored.start :][: stored.size]
            assert raw.clone().view(tensor.dtype).view(tensor.shape).float().equal(tensor.float())


def test_a_header_without_tensors_is_one(file: Path) -> None:
    assert read_header(written(file, {}, data=0)) == {}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"", "its header is not JSON"),
        (b"[1]", "its header is not a JSON object"),
        (b'{"a": ', "its header is not JSON"),
        (b"{}\0", "its header is not JSON"),
        (b'{"\xff": 1}', "its header is not UTF-8 (byte 2)"),
        (b'{"a":' * 100_000, "its header is nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "its header has a number of 5001 digits"),
        (json.dumps({"a": A}).encode()[:-1] + b', "a": 1}', "its header names 'a' twice"),
        ({"a": 1}, "does not describe a by dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [8]}}, "does not describe a by"),
        ({"a": A | {"strides": [3, 1]}}, "does not describe a by"),
        ({"a": A | {"dtype": "F31"}}, "a has dtype 'F31', which is none of BOOL, U8,"),
        ({"a": A | {"dtype": ["F32"]}}, "a has dtype ['F32'], which is none"),
        ({"a\u001b[2J": A}, r"names a tensor 'a\x1b[2J'"),
        ({"a": A | {"shape": [2, -3]}}, "a has shape [2, -3] and"),
        ({"a": A | {"shape": [2, 3.0]}}, "a has shape [2, 3.0] and"),
        ({"a": A | {"shape": [True, 6]}}, "a has shape [True, 6] and"),
        ({"a": A | {"shape": 6}}, "a has shape 6 and"),
        ({"a": A | {"data_offsets": [0]}}, "data_offsets [0]"),
        ({"a": A | {"data_offsets": [24, 0]}}, "a has -24 bytes, but its shape [2, 3] of F32 takes 24"),
        ({"a": A | {"shape": [2, 4]}}, "a has 24 bytes, but its shape [2, 4] of F32 takes 32"),
        ({"a": A, "b": B | {"data_offsets": [16, 24]}}, "b overlaps a by 8 bytes"),
        ({"a": A, "b": A}, "b overlaps a by 24 bytes"),
        ({"a": A, "b": B | {"data_offsets": [26, 34]}}, "2 bytes between a and b are no tensor's"),
        ({"b": B}, "24 bytes between the header and b are no tensor's"),
        ({"a": A}, "8 bytes after a are no tensor's"),
        ({"a": A, "b": A | {"data_offsets": [24, 48]}}, "cut off: b reaches byte"),
        ({"a": A | {"shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, "cut off: a reaches byte"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(file: Path, header: dict[str, Any] | bytes, says: str) -> None:
    assert says in refused(written(file, header))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_shorter_than_its_first_number(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert f"a file of {len(content)} bytes has no header" in refused(file)


@pytest.mark.parametrize("length", [1 << 63, 200_000_000, 33])
def test_a_header_longer_than_its_file(file: Path, length: int) -> None:
    file.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(30))
    assert f"a header of {length:,} bytes does not fit" in refused(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "model.safetensors")
    assert "is no ordinary file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    assert "is no ordinary file" in refused(tmp_path / "pipe")
