"""Built libraries, kept for the next process: `native/` in the user's cache.

    ~/.cache/dsmoe/native/4f2ab6c0d1e8f397-90ab12cd34ef5678.so

The first part of a name stands for what is built and for which machines (the sources, the options, the
processor's kind, the C library), the second for the compiler: home folders are shared by machines that
differ. Where there is no compiler, what any compiler has built serves.

A file ends in the SHA-256 of what is before it, which a loader of libraries does not look at: one that is
damaged is found out before it is loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dsmoe_compiler.atomic import written_whole
from dsmoe_compiler.codegen.user_cache import user_cache
from dsmoe_compiler.interrupt import poll
from dsmoe_compiler.runtime.native.compiler import COMPILE, Compiler, link_options

_FORMAT = 1
_DIGEST = hashlib.sha256().digest_size  # bytes
_DAY = 24 * 60 * 60  # seconds
_KEPT = 30 * _DAY  # a library that was not used for so long goes
_PATIENCE = 0.1  # seconds between looks at a lock, and at whether the user pressed Ctrl-C


@dataclass(frozen=True)
class Place:
    """Where the library of some sources lies, built by `compiler`; None for by any."""

    folder: Path
    what: str
    compiler: str | None

    @staticmethod
    def of(sources: Mapping[str, bytes], compiler: Compiler | None) -> Place:
        """In the user's cache as it is now."""
        machine = (platform.machine(), *platform.libc_ver())
        # Where torch is installed makes no difference, what its OpenMP is called does.
        openmp = [Path(option).name for option in link_options()]
        parts = (_FORMAT, machine, COMPILE, openmp, sorted(sources.items()))
        return Place(user_cache() / "native", _hash(parts), None if compiler is None else _hash(compiler))

    @property
    def file(self) -> Path:
        """Of a compiler's own library."""
        assert self.compiler is not None
        return self.folder / f"{self.what}-{self.compiler}.so"

    def found(self) -> Path | None:
        """A whole library of this place, marked as used; the newest where any compiler's serves."""
        if self.compiler is not None:
            candidates = [self.file]
        else:
            candidates = sorted(self.folder.glob(f"{self.what}-*.so"), key=_age)
        return next((file for file in candidates if _whole(file)), None)

    def keep(self, built: Path) -> Path:
        """The library's place, with what was built in it; others that nobody uses any more go. Raises
        InputError where it cannot be written.
        """
        content = built.read_bytes()
        with written_whole(self.file) as file:
            file.write(content + hashlib.sha256(content).digest())
        for each in self.folder.glob("*.so"):
            if _age(each) > _KEPT:
                each.unlink(missing_ok=True)
        return self.file

    @contextmanager
    def building(self) -> Iterator[None]:
        """While open, others wait who would build too. Only to spare them the work: where files cannot be
        locked, nobody waits.
        """
        with ExitStack() as stack:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                _lock(stack.enter_context(open(self.folder / ".lock", "ab")), stack)
            yield


def _lock(file: BinaryIO, stack: ExitStack) -> None:
    """Locked until the stack is unwound; released by the system when its holder dies."""
    import fcntl  # not on Windows, which has no native kernels

    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            poll()
            time.sleep(_PATIENCE)
    # Closing alone would leave it with a process forked meanwhile.
    stack.callback(fcntl.flock, file, fcntl.LOCK_UN)


def _hash(parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _age(file: Path) -> float:
    """Seconds since it was built or last used."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def _whole(file: Path) -> bool:
    try:
        content = file.read_bytes()
    except OSError:
        return False
    if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        return False
    if _age(file) > _DAY:
        with suppress(OSError):
            os.utime(file)
    return True
