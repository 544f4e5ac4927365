"""Whether a compiled program can be written where the user wants it, asked before the long work."""

from __future__ import annotations

import tempfile
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
