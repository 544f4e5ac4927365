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
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that a forward updates (running statistics, counters) have their values back afterwards."""
    kept = [
        (owner._buffers, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if isinstance(buffer, Tensor)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, before in kept:
                buffers[name] = buffer.copy_(before)


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
