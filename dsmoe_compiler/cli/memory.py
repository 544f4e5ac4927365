"""Whether a model's weights fit, in memory and on the disk, before the long work starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dsmoe_compiler.ir.errors import InputError

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def require_memory(size: int, what: str) -> None:
    """Raise InputError when `size` bytes exceed the memory available; where that is unknown, never."""
    available = available_memory()
    if available is not None and size > available:
        raise InputError(
            f"{what} needs {readable(size)}, {readable(available)} available; "
            "`dsmoe inspect` needs no memory for the weights"
        )


def require_disk(size: int, path: Path) -> None:
    """Raise InputError when `size` bytes do not fit on the disk of the file `path`."""
    free = shutil.disk_usage(path.absolute().parent).free
    if size > free:
        raise InputError(f"{path} needs {readable(size)} on the disk, {readable(free)} free; choose another")


def available_memory() -> int | None:
    """Bytes that can be had without swapping, None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def readable(size: int) -> str:
    """A number of bytes for reading: "578 GB", "4.9 MB"."""
    unit, factor = next(((u, f) for u, f in _UNITS if size >= f), ("bytes", 1))
    amount = size / factor
    return f"{amount:.0f} {unit}" if amount >= 10 else f"{amount:.2g} {unit}"
