"""What a module's host function launches, without a GPU and without running anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name and itself, the grid, its arguments by name, and its options."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, object]
    options: Mapping[str, int]


def launches(module: ModuleType, host: Callable[..., object], *arguments: object) -> list[Launch]:
    """The launches of one call of the module's host function, whose arguments may be on the meta device."""
    found = list[Launch]()
    with _recording(module, found):
        host(*arguments)
    return found


@contextmanager
def _recording(module: ModuleType, into: list[Launch]) -> Iterator[None]:
    kernels = {n: v for n, v in vars(module).items() if isinstance(v, triton.runtime.KernelInterface)}
    vars(module).update({n: _Recorder(n, v, into) for n, v in kernels.items()})
    try:
        yield
    finally:
        vars(module).update(kernels)


@dataclass(frozen=True)
class _Recorder:
    """Stands in a module where a kernel stood."""

    name: str
    kernel: Any
    into: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**given: Any) -> None:
            options = {k: given.pop(k) for k in _OPTIONS if k in given}
            self.into.append(Launch(self.name, self.kernel, tuple(grid), given, options))

        return launch
