"""The user's objects put back as they were: tracing leaves fake tensors in caches, an exception leaves
anything.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe_compiler.reach import reached

_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, deque)


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Afterwards every attribute and container reached from the module holds what it held, in the same order.

    Tensors keep their identity and whether they require gradients; torch its default dtype and random state.
    """
    containers = [(c, type(c)(c) if type(c) in (list, set) else c.copy()) for c in _containers(module)]
    flags = [(t, t.requires_grad) for t in (*module.parameters(), *module.buffers())]
    dtype, random_state = torch.get_default_dtype(), torch.get_rng_state()
    try:
        yield
    finally:
        for container, before in containers:
            _put_back(container, before)
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(random_state)


@contextmanager
def values_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that a forward updates (running statistics, counters), and parameters if it writes into any,
    have their values back afterwards.
    """
    kept = [
        (owner._buffers, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if isinstance(buffer, Tensor)
    ]
    written = _Written(module)
    try:
        with written:
            yield
    finally:
        with torch.no_grad():
            for parameter, before in written.before.values():
                parameter.copy_(before)
            for buffers, name, buffer, before in kept:
                buffers[name] = buffer.copy_(before)


class _Written(TorchDispatchMode):
    """Copies parameters right before they are written into: copies of all would weigh what the model does."""

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before = dict[int, tuple[Tensor, Tensor]]()
        self._sharing = defaultdict[int, list[Tensor]](list)
        for parameter in module.parameters():
            self._sharing[parameter.untyped_storage()._cdata].append(parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)  # torch.cond has none; what it runs is not seen
        if schema is not None and schema.is_mutable:
            for formal, argument in zip(schema.arguments, args, strict=False):
                if formal.alias_info is not None and formal.alias_info.is_write:
                    self._keep(argument)
        return func(*args, **(kwargs or {}))

    def _keep(self, argument: object) -> None:
        for tensor in argument if isinstance(argument, (list, tuple)) else [argument]:
            if isinstance(tensor, Tensor):
                for parameter in self._sharing.get(tensor.untyped_storage()._cdata, ()):
                    if id(parameter) not in self.before:
                        self.before[id(parameter)] = parameter, parameter.detach().clone()


def _containers(module: nn.Module) -> list[Any]:
    kinds = (*_MAPPINGS, *_SEQUENCES, set)
    return [value for _, value in reached(module, into_modules=True) if type(value) in kinds]


def _put_back(container: Any, before: Any) -> None:
    if type(container) in _MAPPINGS:
        same = list(container) == list(before) and all(container[k] is before[k] for k in before)
    elif type(container) in _SEQUENCES:
        same = len(container) == len(before) and all(a is b for a, b in zip(container, before, strict=True))
    else:
        same = container == before
    if same:
        return
    container.clear()
    if type(container) in _SEQUENCES:
        container.extend(before)
    else:
        container.update(before)
