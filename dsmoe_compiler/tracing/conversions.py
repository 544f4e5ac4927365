"""`Module.to` and its like in a forward: nothing to do where nothing would change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def keep_in_place(module: nn.Module) -> None:
    """Have `.to`, `.float` and their like return the module where they would change nothing.

    Sets attributes on the modules; whoever calls puts the modules back.
    """
    for part in module.modules():
        for name in ("to", *_DTYPES):
            setattr(part, name, _unless_needless(part, name, getattr(part, name)))


def _unless_needless(module: nn.Module, name: str, convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def converted(*args: Any, **kwargs: Any) -> Any:
        wanted = (_DTYPES[name],) if name in _DTYPES else args
        device, dtype, _, layout = torch._C._nn._parse_to(*wanted, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        same_dtype = dtype is None or all(t.dtype == dtype for t in tensors if t.is_floating_point())
        same_device = device is None or all(t.device == device for t in tensors)
        return module if same_dtype and same_device and layout is None else convert(*args, **kwargs)

    return converted
