"""A function as a module: the modules and tensors it reaches become submodules, parameters and buffers.

Without that, tracing would take a closed-over parameter for a constant: no name, and no gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.reach import reached


def as_module(model: object) -> nn.Module:
    """The module itself, or a module that calls the function. Raises InputError for what cannot be traced."""
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise InputError("cannot compile TorchScript: give the module it was scripted from")
    if isinstance(model, nn.Module):
        original = getattr(model, "_orig_mod", None)  # what torch.compile wrapped
        return original if isinstance(original, nn.Module) else model
    if isinstance(model, type):
        raise InputError(f"cannot compile the class {model.__name__}: give an instance of it")
    if not callable(model):
        raise InputError(
            f"cannot compile a {type(model).__name__}: give a module, a function or an ExportedProgram"
        )
    return FunctionModule(model)


class FunctionModule(nn.Module):
    """Calls `function`, and owns what it reaches: names are those of the function's variables."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function
        self._tensors: dict[int, str] = {}
        for path, owned in reached(function, into_modules=False):
            name = path or "model"
            while hasattr(self, name):
                name += "_"
            if isinstance(owned, nn.Module):
                self.add_module(name, owned)
            elif isinstance(owned, nn.Parameter):
                self.register_parameter(name, owned)
                self._tensors[id(owned)] = name
            elif isinstance(owned, Tensor):
                self.register_buffer(name, owned)
                self._tensors[id(owned)] = name

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Standing({key: getattr(self, name) for key, name in self._tensors.items()}):
                return function(*args, **kwargs)

        self.forward = functools.update_wrapper(forward, function) if _has_signature(function) else forward


class _Standing(TorchFunctionMode):
    """While open, the module's own attribute stands for the tensor the function closed over: tracing
    swaps the former.
    """

    def __init__(self, standing: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._standing = standing

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = pytree.tree_map(lambda leaf: self._standing.get(id(leaf), leaf), (args, kwargs or {}))
        return func(*args, **kwargs)


def _has_signature(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function)
    except ValueError:  # builtin functions have none
        return False
    return True
