"""One thread at a time where torch keeps what it does in the process, not in the thread.

Tracing patches `nn.Module`'s methods, sets flags that every thread reads and swaps a model's parameters for
fake ones while it runs; serialising registers a reducer for the whole process; logger levels, the default
dtype and the random state, which are put back after a model's code has run, are one for all as well. Two
threads in there at once mix their graphs. A finer lock would have to know torch's inside.

Whoever waits for its turn can be interrupted. A compiled program runs without one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dsmoe_compiler.interrupt import poll

TURN = threading.RLock()
"""Held by compile and inspect, and by load, save and a program's first call while torch works for them."""

_PATIENCE = 0.1  # seconds between looks at whether the user pressed Ctrl-C


@contextmanager
def turn() -> Iterator[None]:
    """`TURN`, for whoever has deferred Ctrl-C and so must look for it while waiting."""
    while not TURN.acquire(timeout=_PATIENCE):
        poll()
    try:
        yield
    finally:
        TURN.release()
