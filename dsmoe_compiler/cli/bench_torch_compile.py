"""torch.compile of the eager model, ready to be measured, or why it is not."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from dsmoe_compiler.cli.bench_inputs import Call

_MOST_PASSES = 5  # over the calls; torch compiles again when sizes of data are others than it has seen
_RING_AGAIN_SECONDS = 5.0  # an exception may be lost in a callback


@dataclass(frozen=True)
class Compiled:
    """What torch.compile made of a model after `seconds`; where it made nothing, `why` says it."""

    run: Callable[..., Any] | None
    seconds: float
    why: str = ""


def torch_compiled(model: Callable[..., Any], calls: Sequence[Call], limit_seconds: float) -> Compiled:
    """Compile a model for these calls, which have the same sizes, and call it until torch compiles no more.

    torch forgets what it has compiled before: every compile knows its sizes, and has the whole of torch's
    limit on compiling again. What takes longer than the limit is given up, where the main thread of a Unix
    process waits for it; elsewhere when it is done.
    """
    torch._dynamo.reset()
    run: Callable[..., Any] = torch.compile(model)
    start = time.perf_counter()
    try:
        in_time = _within(limit_seconds, lambda: _settle(run, calls))
    except Exception as e:  # whatever the compiler, its backend or a missing C++ compiler raises
        torch._dynamo.reset()
        return Compiled(None, time.perf_counter() - start, _first_line(e))
    seconds = time.perf_counter() - start
    if not in_time or seconds > limit_seconds:
        torch._dynamo.reset()
        return Compiled(None, seconds, f"compiling takes more than {limit_seconds:g} s")
    return Compiled(run, seconds)


def _settle(run: Callable[..., Any], calls: Sequence[Call]) -> None:
    for _ in range(_MOST_PASSES):
        before = _compiled_frames()
        for args, kwargs in calls:
            run(*args, **kwargs)
        if _compiled_frames() == before:
            return


def _compiled_frames() -> int:
    return int(torch._dynamo.utils.counters["frames"]["total"])


class _TooLong(BaseException):
    """Raised by the clock; no `except Exception` of the compiler's holds it."""


def _within(seconds: float, work: Callable[[], None]) -> bool:
    """Whether the work was done in time; it is broken off otherwise, as Ctrl-C would."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        work()
        return True

    def ring(signum: int, frame: FrameType | None) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _RING_AGAIN_SECONDS)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except _TooLong:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return True


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
