"""The native library of this machine: found or built on first use, loaded once a process.

Where there is none (no compiler, another processor, a build that fails) the layers run by torch's operators,
and a warning says once why. DSMOE_CPU_LEVEL chooses an instruction level, or torch.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dsmoe_compiler.codegen.native.sources import sources
from dsmoe_compiler.interrupt import poll
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.runtime.native.build import BuildFailed, build
from dsmoe_compiler.runtime.native.cache import Place
from dsmoe_compiler.runtime.native.compiler import Compiler, find_compiler
from dsmoe_compiler.runtime.native.levels import (
    LEVELS,
    TORCH,
    VARIABLE,
    asked,
    machine_level,
    require,
    supported_platform,
    this_platform,
)

__all__ = ["LEVELS", "Library", "Unavailable", "describe", "native"]


@dataclass(frozen=True)
class Library:
    """The loaded library, and the level in use: the one that was asked for, or the machine's best."""

    handle: ctypes.CDLL
    level: str


@dataclass(frozen=True)
class Unavailable:
    """Why layers run by torch's operators, in one line."""

    because: str


_TURN = threading.Lock()  # held while a thread loads or builds the library
_PATIENCE = 0.1  # seconds between looks at whether the user pressed Ctrl-C
_opened: ctypes.CDLL | Unavailable | None = None


def native() -> Library | Unavailable:
    """The library, built if this machine has none yet. Raises InputError for a DSMOE_CPU_LEVEL that is no
    level, or one that the machine lacks.
    """
    level = asked()
    if level == TORCH:
        return _BY_CHOICE
    if level:
        require(level, machine_level())
    if not machine_level():
        return _told(_no_level())
    opened = _open_once()
    if isinstance(opened, Unavailable):
        return _told(opened)
    best = opened.dsmoe_best_level()
    if level:
        require(level, best)
    return Library(opened, level or LEVELS[best - 1]) if best else _told(_no_level())


def describe() -> str:
    """What `native` would find, for the reader of a report, with nothing built. Raises InputError as it
    does.
    """
    level = asked()
    if level == TORCH:
        return _in_words(_BY_CHOICE)
    best = _opened.dsmoe_best_level() if isinstance(_opened, ctypes.CDLL) else machine_level()
    if level:
        require(level, best)
    if not best:
        return _in_words(_no_level())
    if isinstance(_opened, Unavailable):
        return _in_words(_opened)
    kernels = f"native kernels, {level or LEVELS[best - 1]}"
    if _opened is not None:
        return kernels
    compiler = find_compiler()
    if _place(sources(), compiler).found():
        return kernels
    if not isinstance(compiler, Compiler):
        return _in_words(Unavailable(compiler.because))
    return f"{kernels}, built when first used"


_BY_CHOICE = Unavailable(f"{VARIABLE}={TORCH}")


def _no_level() -> Unavailable:
    if not supported_platform():
        return Unavailable(f"native kernels are for x86_64 Linux, this is {this_platform()}")
    return Unavailable("this processor has no AVX2")


def _in_words(missing: Unavailable) -> str:
    return f"torch operators: {missing.because}"


def _told(missing: Unavailable) -> Unavailable:
    _warn(f"MoE layers on a CPU run by torch's operators, which are slower: {missing.because}")
    return missing


@cache
def _warn(message: str) -> None:
    """Once for each message."""
    warnings.warn(message, stacklevel=2)


def _open_once() -> ctypes.CDLL | Unavailable:
    global _opened
    with _turn():
        if _opened is None:
            _opened = _open()
        return _opened


@contextmanager
def _turn() -> Iterator[None]:
    """`_TURN`, for whoever may have deferred Ctrl-C."""
    while not _TURN.acquire(timeout=_PATIENCE):
        poll()
    try:
        yield
    finally:
        _TURN.release()


def _open() -> ctypes.CDLL | Unavailable:
    texts, compiler = sources(), find_compiler()
    place = _place(texts, compiler)
    kept = _kept(place)
    if kept:
        return kept
    if not isinstance(compiler, Compiler):
        return Unavailable(compiler.because)
    with place.building():
        return _kept(place) or _built(place, texts, compiler)


def _place(texts: Mapping[str, bytes], compiler: object) -> Place:
    return Place.of(texts, compiler if isinstance(compiler, Compiler) else None)


def _kept(place: Place) -> ctypes.CDLL | None:
    """The library that was built before; None where there is none that this machine can load."""
    file = place.found()
    try:
        return None if file is None else _loaded(file)
    except OSError:
        return None


def _loaded(file: Path) -> ctypes.CDLL:
    """Raises OSError where the file is no library of ours, or not for this machine."""
    handle = ctypes.CDLL(str(file))
    if not hasattr(handle, "dsmoe_best_level"):
        raise OSError(f"{file}: has no dsmoe_best_level")
    return handle


def _built(place: Place, texts: Mapping[str, bytes], compiler: Compiler) -> ctypes.CDLL | Unavailable:
    try:
        # What is loaded stays when its file goes.
        with tempfile.TemporaryDirectory(prefix="dsmoe-", ignore_cleanup_errors=True) as folder:
            built = build(texts, compiler, Path(folder))
            try:
                built = place.keep(built)
            except (InputError, OSError) as e:
                _warn(f"the native kernels are built anew by every process: {e}")
            return _loaded(built)
    except (BuildFailed, OSError) as e:
        return Unavailable(str(e))
