"""A file that appears under its name only when it is complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dsmoe_compiler.ir.errors import InputError


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which replaces `path` if all goes well and else is gone. Raises InputError when
    it cannot be written.
    """
    try:
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            kind = "a folder; give a file name" if path.is_dir() else "no ordinary file; choose another place"
            raise InputError(f"{path}: is {kind}")
        partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
        # Made as any file is: the kernel applies the umask, which another thread's files depend on too.
        file = open(partial, "xb")  # noqa: SIM115
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be written ({_reason(e)}); choose another place") from e
    try:
        with file:
            yield file
        if path.exists():
            partial.chmod(path.stat().st_mode)
        os.replace(partial, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({_reason(e)}); choose another place") from e
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
