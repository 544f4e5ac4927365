"""Whether a file can be written where the user wants it, asked before the long work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dsmoe_compiler.ir.errors import InputError


def require_writable(path: Path) -> None:
    """Raise InputError unless a `.pt2` file can be written at `path`. Leaves nothing there."""
    require_place(path, ".pt2", "a compiled program")


def require_place(path: Path, suffix: str, what: str) -> None:
    """Raise InputError unless a file whose name ends in `suffix` can be written at `path`."""
    if path.suffix != suffix:
        raise InputError(f"cannot write {path}: {what}'s name ends in {suffix}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    _require_open_folder(path)


def require_text_place(path: Path) -> None:
    """Raise InputError unless text can be written at `path`: a file, new or old, or a device."""
    if not path.exists():
        _require_open_folder(path)
        return
    try:
        with path.open("ab"):
            pass
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}; choose another file") from e


def write_text(path: Path, text: str) -> None:
    """Write a file of text. Raises InputError when that fails after all, as on a full disk."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}; choose another place") from e


def require_folder(path: Path) -> None:
    """Make the folder `path` unless it is there. Raise InputError when no file can be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the folder {path}: {e.strerror}; choose another") from e
    _require_open_folder(path / "file")


def _require_open_folder(path: Path) -> None:
    try:
        # Asked of the system by doing it: permission bits say nothing to root or on a read-only disk.
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror} ({path.parent}); choose another folder") from e
