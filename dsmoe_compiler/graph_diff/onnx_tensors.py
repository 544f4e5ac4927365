"""Tensors of an ONNX model: their types, how many bytes they take, and where these are.

Data beside the model is counted by the lengths the model states, whether or not it is there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path
from typing import Any

from dsmoe_compiler.graph_diff.content import Content, Held, InFile
from dsmoe_compiler.graph_diff.facts import Tensor, TensorType
from dsmoe_compiler.ir.errors import InputError

_WORDS = {"FLOAT": "f32", "DOUBLE": "f64", "BOOL": "bool", "STRING": "string", "UNDEFINED": "?"}
_LETTERS = {"FLOAT": "f", "BFLOAT": "bf", "INT": "i", "UINT": "u", "COMPLEX": "c"}
_BITS = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}
_EXTERNAL = 1  # TensorProto.EXTERNAL


def dtype_name(number: int) -> str:
    """ "f32", "bf16", "i4", "bool", "float8_e4m3fn": an ONNX element type, spelled as in the textual IR."""
    name = _element_type(number)
    if name in _WORDS:
        return _WORDS[name]
    word, bits, rest = _parts(name)
    return f"{word.lower()}{bits}_{rest.lower()}" if rest else f"{_LETTERS.get(word, word.lower())}{bits}"


def _element_type(number: int) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(number)) if number in TensorProto.DataType.values() else f"T{number}"


def _parts(name: str) -> tuple[str, str, str]:
    """FLOAT8E4M3FN is FLOAT, 8, E4M3FN."""
    found = re.fullmatch(r"([A-Z]+)(\d*)(.*)", name)
    assert found is not None
    return found[1], found[2], found[3]


def tensor_type(tensor: Any) -> TensorType:
    """The type of a TensorProto."""
    return TensorType(dtype_name(tensor.data_type), tuple(tensor.dims))


def _expected_bytes(tensor: Any) -> int:
    """What its type says that it takes, numbers of less than a byte packed."""
    name = _element_type(tensor.data_type)
    bits, elements = _BITS.get(name) or int(_parts(name)[1] or 0), math.prod(map(int, tensor.dims))
    return max(0, -(-elements * bits // 8))


@dataclass
class TensorReader:
    """Reads the tensors of the model at `path`, and adds up where their data is.

    `inside` counts the bytes that lie in the model's own file, `beside` those next to it, data that several
    tensors share once.
    """

    path: Path
    inside: int = 0
    _ranges: dict[tuple[str, int, int], None] = field(default_factory=dict)
    _unreadable: Counter[str] = field(default_factory=Counter)

    @property
    def beside(self) -> int:
        return sum(length for _, _, length in self._ranges)

    def notes(self) -> Iterator[str]:
        """A sentence for each file whose data could not be had."""
        for why, count in sorted(self._unreadable.items()):
            tensors = "the content of 1 tensor" if count == 1 else f"the contents of {count} tensors"
            yield f"{self.path}: {why}: {tensors} cannot be compared"

    def read(self, name: str, tensor: Any) -> Tensor:
        """Raises InputError where it says something impossible of itself."""
        if tensor.data_location == _EXTERNAL:
            size, content = self._external(name, tensor)
        else:
            content = inline_content(tensor)
            size = _expected_bytes(tensor) if content is None else content.size
            self.inside += tensor.ByteSize() if content is None else content.size
        return Tensor(name, tensor_type(tensor), size, content)

    def read_sparse(self, name: str, sparse: Any) -> Tensor:
        """A sparse initializer: its values, then their places."""
        values, indices = (self.read(name, part) for part in (sparse.values, sparse.indices))
        content = None
        if isinstance(values.content, Held) and isinstance(indices.content, Held):
            content = Held(values.content.data + indices.content.data)
        kind = TensorType(f"sparse {values.type.dtype}", tuple(sparse.dims))
        return Tensor(name, kind, values.bytes + indices.bytes, content)

    def _external(self, name: str, tensor: Any) -> tuple[int, Content | None]:
        said = {str(entry.key): str(entry.value) for entry in tensor.external_data}
        location = said.get("location", "")
        offset = self._number(name, "offset", said.get("offset", "0"))
        length = self._number(name, "length", said.get("length") or str(_expected_bytes(tensor)))
        self._ranges[location, offset, length] = None
        if not location or Path(location).is_absolute() or ".." in Path(location).parts:
            self._unreadable[f"its data is said to be outside its folder ({location or 'nowhere'})"] += 1
            return length, None
        content = InFile(self.path.parent.resolve() / location, offset, length)
        if not content.available:
            missing = "shorter than the model says" if isfile(content.path) else "missing"
            self._unreadable[f"{location} is {missing}"] += 1
        return length, content

    def _number(self, name: str, key: str, text: str) -> int:
        if not text.isdecimal():
            raise InputError(
                f"{self.path}: is damaged: the {key} of {name}'s data is {text!r}; export it again"
            )
        return int(text)


def inline_content(tensor: Any) -> Held | None:
    """The bytes of a tensor that lies in the message itself; None where they do not fit its type."""
    if tensor.HasField("raw_data"):
        return Held(tensor.raw_data)
    if tensor.string_data:
        return Held(b"".join(len(s).to_bytes(8, "little") + s for s in tensor.string_data))
    if 0 < int(_parts(_element_type(tensor.data_type))[1] or 8) < 8:
        return Held(bytes(byte & 0xFF for byte in tensor.int32_data))  # already packed
    from onnx import numpy_helper

    try:
        return Held(numpy_helper.to_array(tensor).tobytes())
    except (ValueError, TypeError, KeyError):
        return None
