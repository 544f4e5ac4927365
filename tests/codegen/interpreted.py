"""Triton's interpreter in a process that also compiles: both, side by side.

Triton decides where a function is decorated whether it will be compiled or interpreted, and its own library
(`tl.sum`, `tl.max`, …) is decorated on the first import of `triton`. With `TRITON_INTERPRET=1` in the
environment a process can therefore only interpret, and without it only compile. Besides, a device function
that was interpreted leaves `triton.language` patched, and what is compiled afterwards fails.

Here the kernels, and the library once more, are imported a second time with the knob set; `interpreter()`
puts the library's interpreted twin in place, and everything in `triton.language` as it was when it ends.

    route = interpreted("route").route          # codegen/kernels/route.py
    with interpreter():
        route[(blocks,)](…)                     # on CPU tensors
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import triton
import triton.language as tl

_KERNELS = "dsmoe_compiler.codegen.kernels"
# What the interpreter patches, in kernels and in the library's functions alike.
_PATCHED: tuple[Any, ...] = (
    tl,
    tl.core,
    tl.math,
    tl.core.tensor,
    tl.core.tensor_descriptor_base,
    tl.core.dtype,
    tl.core.condition,
)


@cache
def interpreted(name: str) -> ModuleType:
    """The module `codegen/kernels/{name}.py`, its kernels and those that it imports made for the
    interpreter."""
    # Out of the table of modules and back, so that the compiled kernels stay what others import.
    compiled = {n: m for n, m in sys.modules.items() if n.startswith(_KERNELS)}
    room = importlib.import_module("dsmoe_compiler.codegen")
    package = vars(room).get("kernels")
    with _interpreting():
        try:
            for n in compiled:
                del sys.modules[n]
            for n, m in _TWINS.items():
                sys.modules[n] = m
            return importlib.import_module(f"{_KERNELS}.{name}")
        finally:
            for n in [n for n in sys.modules if n.startswith(_KERNELS)]:
                _TWINS[n] = sys.modules.pop(n)
            sys.modules.update(compiled)
            if package is None:
                vars(room).pop("kernels", None)
            else:
                vars(room)["kernels"] = package


# The interpreted modules that were imported so far: one that two others import is the same in both.
_TWINS: dict[str, ModuleType] = {}


@contextmanager
def interpreter() -> Iterator[None]:
    """Where interpreted kernels are launched; also where text that holds kernels is executed for it."""
    library, members = _library()
    with _interpreting():
        for name, value in vars(tl.standard).items():
            if isinstance(value, triton.runtime.JITFunction) and vars(tl).get(name) is value:
                setattr(tl, name, getattr(library, name))
        for name, value in members.items():
            setattr(tl.core.tensor, name, value)
        tl.standard = library
        yield


@cache
def _library() -> tuple[ModuleType, dict[str, Any]]:
    """The interpreted twin of `triton.language.standard`, and the methods that it gives to tensors."""
    spec = find_spec("triton.language.standard")
    assert spec is not None and spec.loader is not None
    twin = module_from_spec(spec)
    with _interpreting():
        before = dict(vars(tl.core.tensor))
        spec.loader.exec_module(twin)
        return twin, {n: v for n, v in vars(tl.core.tensor).items() if before.get(n) is not v}


@contextmanager
def _interpreting() -> Iterator[None]:
    """The knob set; afterwards it, and all that the interpreter patches, as before."""
    before = [dict(vars(owner)) for owner in _PATCHED]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        try:
            yield
        finally:
            for owner, values in zip(_PATCHED, before, strict=True):
                _restore(owner, values)


def _restore(owner: Any, values: dict[str, Any]) -> None:
    for name, value in dict(vars(owner)).items():
        if name not in values:
            delattr(owner, name)
        elif values[name] is not value:
            setattr(owner, name, values[name])
