"""One thread at a time where torch keeps what it does in the process, not in the thread.

Tracing patches `nn.Module`'s methods, sets flags that every thread reads and swaps a model's parameters for
fake ones while it runs; serialising registers a reducer for the whole process; logger levels, the default
dtype and the random state, which are put back after a model's code has run, are one for all as well. Two
threads in there at once mix their graphs. A finer lock would have to know torch's inside.

Whoever waits for its turn can be interrupted. A compiled program runs without one.
"""

from __future__ import annotations

import threading

TURN = threading.RLock()
"""Held by compile and inspect, and by load, save and a program's first call while torch works for them."""
