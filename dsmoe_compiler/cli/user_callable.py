"""`package.module:callable`: the user's own model."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from torch import nn

from dsmoe_compiler.cli.model_argument import ModelCall
from dsmoe_compiler.ir.errors import InputError


def user_call(text: str) -> ModelCall:
    """The model that `package.module:callable` names.

    A callable that needs no arguments is a factory: it returns a module, or (model, args, kwargs). Any other
    callable, and any module, is the model itself. Raises InputError when there is no such thing, or
    when the user's own code fails.
    """
    module_name, _, path = text.partition(":")
    if not (module_name and path):
        raise InputError(f"{text} is no model: say package.module:callable")
    found = _attribute(_module(module_name), path, text)
    if isinstance(found, nn.Module):
        return ModelCall(found, (), {})
    if not callable(found):
        raise InputError(f"{text} is a {type(found).__name__}; name a module, a function or a factory")
    if _needs_arguments(found):
        if isinstance(found, type):
            raise InputError(f"{text} is a class that needs arguments; name a function that builds the model")
        return ModelCall(found, (), {})
    return _product(text, _call(text, found))


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name and f"{name}.".startswith(f"{e.name}."):
            raise InputError(
                f"no module {e.name!r}; it must lie in the current folder or be installed"
            ) from e
        raise InputError(f"importing {name} failed: {_what_and_where(e)}") from e


def _attribute(module: ModuleType, path: str, text: str) -> object:
    found: object = module
    for name in path.split("."):
        if not hasattr(found, name):
            public = [each for each in vars(module) if not each.startswith("_")]
            nearest = difflib.get_close_matches(name, public, n=3)
            hint = f"; the nearest names are: {', '.join(nearest)}" if nearest else ""
            raise InputError(f"{text}: {module.__name__} has no {path!r}{hint}")
        found = getattr(found, name)
    return found


def _needs_arguments(function: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return True  # a built-in without a signature takes tensors
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(each.default is each.empty and each.kind not in optional for each in parameters)


def _call(text: str, factory: Callable[..., object]) -> object:
    try:
        return factory()
    except Exception as e:
        raise InputError(f"calling {text} failed: {_what_and_where(e)}") from e


def _product(text: str, made: object) -> ModelCall:
    match made:
        case nn.Module():
            return ModelCall(made, (), {})
        case (model, tuple() | list() as args, dict() as kwargs) if callable(model):
            return ModelCall(model, tuple(args), dict(kwargs))
    raise InputError(f"{text} returned a {type(made).__name__}; return a module or (model, args, kwargs)")


def _what_and_where(error: Exception) -> str:
    """The exception in one line, with the line of the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and frames[-1].lineno else ""
    if isinstance(error, SyntaxError):
        where = ""  # its own text says where
    return f"{type(error).__name__}: {error}{where}"
