"""`int(…)` and `len(…)` of a size that varies, kept symbolic: a capacity is int(factor * tokens * K / E).

Python has them return a number, so a size that passes through is baked into the graph. Where tracing sees
that happen, the functions concerned run once more as copies that look up `int`, `len`, `max` and `min`
elsewhere: the same code on the same globals, but for these names. The user's functions and modules stay
as they are; the copies are set on the model's modules for one trace, by whoever puts those back afterwards.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Collection
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Codes: TypeAlias = Collection[CodeType]
_SIZES = (torch.SymInt, torch.SymFloat)


class _IntType(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            number = args[0].item() if _is_integer(args[0]) else args[0]
            if isinstance(number, _SIZES):
                return torch.sym_int(number)  # type: ignore[no-untyped-call]
        return builtins.int(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.int)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, builtins.int)


class _Int(int, metaclass=_IntType):
    """Stands for `int`; what it makes are integers, or sizes that stay symbolic."""


def _is_integer(found: Any) -> bool:
    tensor = isinstance(found, Tensor) and not found.is_floating_point() and not found.is_complex()
    return bool(tensor and found.numel() == 1)


def _length(found: Any) -> Any:
    return found.shape[0] if isinstance(found, Tensor) and found.dim() else len(found)


def _extreme(plain: Callable[..., Any], symbolic: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs and any(isinstance(a, _SIZES) for a in args):
            return symbolic(*args)
        return plain(*args, **kwargs)

    return chosen


_BUILTINS: dict[str, Any] = {
    **vars(builtins),
    "int": _Int,
    "len": _length,
    "max": _extreme(max, torch.sym_max),
    "min": _extreme(min, torch.sym_min),
}


class _Globals(dict[str, Any]):
    """The globals of a user's module, its functions of `codes` copied as they are looked up."""

    def __init__(self, original: dict[str, Any], codes: Codes) -> None:
        super().__init__(__builtins__=_BUILTINS)
        self._original, self._codes = original, codes

    def __missing__(self, name: str) -> Any:
        found = self._original[name]
        return _copy(found, self._codes) if _is_of(found, self._codes) else found


def _is_of(found: object, codes: Codes) -> bool:
    return isinstance(found, FunctionType) and found.__code__ in codes


def _copy(function: FunctionType, codes: Codes) -> FunctionType:
    space = _Globals(function.__globals__, codes)
    copy = FunctionType(
        function.__code__, space, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__wrapped__ = function  # type: ignore[attr-defined]
    return copy


def keep_symbolic(module: nn.Module, codes: Codes) -> None:
    """Have the methods with this code, and the functions they call with it, keep sizes symbolic.

    Sets attributes on the modules; whoever calls puts the modules back.
    """
    for part in module.modules():
        for owner in reversed(type(part).__mro__):
            for name, found in vars(owner).items():
                if _is_of(found, codes):
                    setattr(part, name, MethodType(_copy(found, codes), part))
        for name, found in list(vars(part).items()):
            if _is_of(found, codes):
                setattr(part, name, _copy(found, codes))
