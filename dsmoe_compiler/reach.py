"""What a user's object reaches: through attributes, containers, closures and the globals a function reads."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (dict, list, tuple, set, deque)
_CALLABLES = (FunctionType, MethodType, functools.partial)


def reached(root: object, *, into_modules: bool) -> Iterator[tuple[str, object]]:
    """Every value reached and the name it goes by (no dots), nearest first, each once.

    What belongs to Python or torch is not walked, nor, without `into_modules`, what lies below an nn.Module.
    """
    seen, queue = set[int](), deque([("", root)])
    while queue:
        name, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield name, value
        if isinstance(value, Tensor) or (isinstance(value, nn.Module) and not into_modules):
            continue
        owner = "" if isinstance(value, _CALLABLES) else name
        for part, below in _parts(value):
            queue.append(("_".join(p for p in (owner, part.replace(".", "_")) if p), below))


def _parts(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield "", value.func
        yield from ((str(i), item) for i, item in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, FunctionType):
        yield from _variables(value)
    elif isinstance(value, MethodType):
        yield ("model" if isinstance(value.__self__, nn.Module) else ""), value.__self__
        yield "", value.__func__
    elif isinstance(value, dict):
        yield from ((str(key), item) for key, item in list(value.items()))
    elif isinstance(value, _CONTAINERS):
        yield from ((str(i), item) for i, item in enumerate(list(value)))
    elif isinstance(value, nn.Module) or (hasattr(value, "__dict__") and not _is_library(value)):
        yield "", vars(value)


def _variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    if _package(function) == "torch":
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    for name in dict.fromkeys(_globals_read(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _globals_read(code: CodeType) -> Iterator[str]:
    yield from (str(i.argval) for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_read(constant)


def _is_library(value: object) -> bool:
    if inspect.ismodule(value) or isinstance(value, type):
        return True
    package = _package(type(value))
    return package == "torch" or package in sys.stdlib_module_names


def _package(home: object) -> str:
    return (getattr(home, "__module__", None) or "").split(".")[0]
