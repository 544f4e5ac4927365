"""A written model with its functions in the places of onnxruntime's kernels, to be held against the program:
the kernels of whole numbers round a row's numbers to 8 bits, the functions do not.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx.inliner


@contextmanager
def without_kernels(path: Path) -> Iterator[Path]:
    """While open, a model beside the one at `path`, on the same weights, that calls no function."""
    beside = path.with_name(f".{secrets.token_hex(8)}.onnx")
    model = onnx.load(path, load_external_data=False)
    try:
        onnx.save(onnx.inliner.inline_local_functions(model), beside)
        yield beside
    finally:
        beside.unlink(missing_ok=True)
