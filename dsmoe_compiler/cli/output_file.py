"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsmoe_compiler.ir.errors import InputError


def require_writable(path: Path) -> None:
    """Raise InputError unless a `.pt2` file can be written at `path`. Leaves nothing there."""
    if path.suffix != ".pt2":
        raise InputError(f"cannot write {path}: a compiled program's name ends in .pt2")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        # Asked of the system by doing it: permission bits say nothing to root or on a read-only disk.
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror} ({path.parent}); choose another folder") from e


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, moved there on success and removed on anything else."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
