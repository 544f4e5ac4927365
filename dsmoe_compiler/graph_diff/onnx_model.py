"""An `.onnx` file as its protobuf message, data beside it left where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsmoe_compiler.ir.errors import InputError

_LARGEST = 2**31  # of a protobuf message, in bytes


def read_model(path: Path) -> Any:
    """The ModelProto in a file. Raises InputError when there is no such file, or it is no ONNX model."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as e:
        raise InputError(f'{path}: reading it needs onnx: pip install "dsmoe-compiler[onnx]"') from e
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give an .onnx file in it")
    if not path.exists():
        raise InputError(f"{path}: no such file; give an .onnx file")
    if not path.is_file():  # opening a pipe would wait for somebody to write into it
        raise InputError(f"{path}: is no ordinary file; give an .onnx file")
    try:
        if path.stat().st_size >= _LARGEST:
            raise InputError(f"{path}: has 2 GB or more, as no ONNX file has; its data would be beside it")
        model = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give an .onnx file") from e
    except DecodeError as e:
        raise InputError(f"{path}: is damaged, cut off, or no ONNX file; export it again") from e
    # Any few bytes may be a message. What ends in the middle lacks the opset, which comes after the graph.
    if not model.HasField("graph") or not model.opset_import:
        lacks = "operator set" if model.HasField("graph") else "graph"
        raise InputError(f"{path}: is damaged, cut off, or no ONNX file: it has no {lacks}; export it again")
    return model
