"""A model in a file and its weights in one other beside it, both whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from dsmoe_compiler.ir.errors import InputError

# Larger tensors begin at pages, so that a runtime can map them.
_PAGE, _ALIGNED = 4096, 1 << 20
_INSIDE = 1024  # bytes up to which a tensor stays in the model's own file


def data_path(path: Path) -> Path:
    """Where the weights of the model at `path` lie."""
    return path.with_name(f"{path.name}.data")


def require_place(path: Path) -> None:
    """Raise InputError unless a model can be written to `path`. Leaves nothing there."""
    with _folder_beside(path):
        pass


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder to write in, on the disk where `path` is to be, gone afterwards. Raises InputError."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no file; give a file name")
    folder = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, ValueError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise InputError(f"{path}: cannot be written ({reason}); choose another place") from e


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def write(model: ir.Model, path: Path) -> None:
    """Write the model to `path` and its weights to `data_path(path)`, a tensor at a time.

    Raises InputError when the place cannot be written, or a weight not as it should be; what lay there before
    is then left. Without weights there is no file of them, and one that lay there is removed.
    """
    with _folder_beside(path) as folder:
        try:
            ir.save(
                model,
                folder / path.name,
                external_data=data_path(path).name,
                size_threshold_bytes=_INSIDE,
                max_workers=1,
                alignment=_PAGE,
                align_threshold=_ALIGNED,
            )
        except ir.serde.SerdeError as e:  # around whatever the tensors in the model's own file raise
            raise _first_cause(e) from e
        data = folder / data_path(path).name
        if data.exists() and data.stat().st_size:
            os.replace(data, data_path(path))
        else:
            data_path(path).unlink(missing_ok=True)
        os.replace(folder / path.name, path)
