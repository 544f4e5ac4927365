"""Run layers on tensors that end, or begin, at memory that nobody may touch.

    python -m tests.runtime.guarded_process

A read or write beside a tensor kills the process. Prints each case before it runs, and at the end the levels
that were run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from dataclasses import replace
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dsmoe_compiler.runtime.native.library import LEVELS, Library, native
from tests.codegen.layers import LAYOUTS, Made, make
from tests.codegen.pairwise import Case, pairwise
from tests.runtime.native_levels import assert_close, rounding, run

FACTORS: dict[str, tuple[Any, ...]] = {
    "body": ("swiglu", "relu"),
    "layout": LAYOUTS,
    "transposed": (False, True),
    "weighs": ("output", "input", "middle"),
    "router": ("", "softmax"),
    "shared": ("", "plain", "gated"),
    "tokens": (1, 3, 5, 18, 70),
    "top_k": (1, 2, 3),
    "sizes": ((64, 32), (40, 24), (19, 37), (97, 130), (33, 95), (1, 2)),
    "dtype": ("float32", "bfloat16"),
    "threads": (1, 2),
}
_NOTHING, _ANYTHING = 0, mmap.PROT_READ | mmap.PROT_WRITE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def room(size: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> Tensor:
    """A dense tensor between two pages that nobody may touch, up to one of them. It is never given back."""
    needed = prod(size) * dtype.itemsize
    inside = max(1, -(-needed // mmap.PAGESIZE)) * mmap.PAGESIZE
    begin = _libc.mmap(
        None, inside + 2 * mmap.PAGESIZE, _NOTHING, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    begin += mmap.PAGESIZE
    assert _libc.mprotect(begin, inside, _ANYTHING) == 0
    if not needed:
        return torch.empty(size, dtype=dtype)
    memory = (ctypes.c_char * needed).from_address(begin + inside - needed if at_end else begin)
    return torch.frombuffer(memory, dtype=dtype).view(size)


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A dense copy of it there."""
    return room(tuple(tensor.shape), tensor.dtype, at_end).copy_(tensor)


def moved(made: Made, at_end: bool) -> Made:
    return replace(
        made,
        x=guarded(made.x, at_end),
        ids=guarded(made.ids, at_end),
        weights=guarded(made.weights, at_end),
        params=[guarded(p, at_end) for p in made.params],
        shared=[guarded(p, at_end) for p in made.shared],
    )


def require_guarded(at_end: bool) -> None:
    """Whether one byte further kills: a child tries."""
    tensor = room((3,), torch.float32, at_end)
    child = os.fork()
    if child == 0:
        ctypes.c_char.from_address(tensor.data_ptr() + (12 if at_end else -1)).value  # noqa: B018
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV, "nothing guards the tensors"


def guarded_run(made: Made, level: str, at_end: bool) -> Tensor:
    """The layer with everything it is given, and its output, there."""
    given, empty = moved(made, at_end), torch.empty

    def out(*size: Any, **how: Any) -> Tensor:
        """The output's memory; what is not of its kind as ever."""
        if set(how) != {"dtype"} or not all(isinstance(n, int) for n in size):
            return empty(*size, **how)
        return room(size, how["dtype"], at_end).fill_(torch.nan)

    with patch.object(torch, "empty", out):
        return run(given, level)


def nearness(case: Case, expected: Tensor) -> tuple[float, float]:
    """How far off a row may be, and beside which size: a few rows of one number may all cancel."""
    hidden, width = case["sizes"]
    allowed = rounding(
        getattr(torch, case["dtype"]),
        hidden,
        2 * width,
        weighted_tokens=case["weighs"] == "input",
        gated=case["shared"] == "gated",
    )
    return allowed, max(0.01, expected.abs().max().item() / 2)


def _allowed(case: Case) -> bool:
    return (bool(case["router"]) or not case["shared"]) and (
        case["sizes"] != (1, 2) or case["shared"] != "gated"
    )


def main() -> None:
    library = native()
    assert isinstance(library, Library), library
    levels = LEVELS[: LEVELS.index(library.level) + 1]
    for at_end in (True, False):
        require_guarded(at_end)
    for case in pairwise(FACTORS, _allowed):
        torch.set_num_threads(case["threads"])
        made = make(biased=True, experts=3, **{k: v for k, v in case.items() if k != "threads"})
        expected = made.expected()
        for level in levels:
            for at_end in (True, False):
                print(level, "ending" if at_end else "beginning", "there:", case, flush=True)
                assert_close(guarded_run(made, level, at_end), expected, *nearness(case, expected))
    print(*levels)


if __name__ == "__main__":
    main()
