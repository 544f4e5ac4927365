"""Which of several calls is faster: rounds in which all of them take turns, and medians.

Other work on a machine slows calls by factors, now one, now another. So candidates take turns within one run,
each ratio is taken within a round, where both sides had the same disturbance or none, and rounds in which the
scheduler took the processor away are left out while quieter ones exist.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEAST_ROUNDS = 5  # are measured however little time there is


@dataclass(frozen=True)
class Rounds:
    """Seconds of each candidate, round by round: `seconds[name][i]` is of round i, for every name."""

    seconds: Mapping[str, tuple[float, ...]]
    discarded: int

    @property
    def kept(self) -> int:
        """How many rounds the figures are of."""
        return min(map(len, self.seconds.values()), default=0)

    def median(self, name: str) -> float:
        """The median round of a candidate, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times `fast` is faster than `slow`: the median of the rounds' own ratios."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleaved(
    candidates: Mapping[str, Callable[[int], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    budget_seconds: float | None = None,
    before: Mapping[str, Callable[[int], object]] | None = None,
) -> Rounds:
    """Call every candidate once a round, with the round's number; wall time unless `clock` tells another.

    The order turns from round to round. One warm-up round comes first. Fewer than `rounds` are measured once
    the budget, if there is one, is spent, but `LEAST_ROUNDS`. `before` holds what is done just before a
    candidate's call, untimed. Of the measured rounds the half with the fewest preemptions is kept: on a quiet
    machine any half is as good as another.
    """
    for call in candidates.values():
        call(0)
    taken: list[tuple[int, dict[str, float]]] = []
    end = None if budget_seconds is None else time.perf_counter() + budget_seconds
    for i in range(rounds):
        if end is not None and i >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        names = list(candidates)[:: 1 if i % 2 else -1]
        start, times = _preemptions(), dict[str, float]()
        for name in names:
            if before and name in before:
                before[name](i)
            times[name] = _seconds(candidates[name], i, clock)
        taken.append((_preemptions() - start, times))
    kept = sorted(taken, key=lambda r: r[0])[: (len(taken) + 1) // 2]
    return Rounds({n: tuple(times[n] for _, times in kept) for n in candidates}, len(taken) - len(kept))


def _seconds(call: Callable[[int], object], round_number: int, clock: Callable[[], float]) -> float:
    start = clock()
    call(round_number)
    return clock() - start


def _preemptions() -> int:
    """How often the scheduler has taken the processor from this process, and for how many ticks a hypervisor
    has taken it from all of them; 0 where the system does not say.
    """
    try:
        import resource
    except ImportError:  # not Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw + _stolen_ticks()


def _stolen_ticks() -> int:
    """Of all processors, as Linux counts them; 0 elsewhere."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            fields = stat.readline().split()  # cpu, user, nice, system, idle, iowait, irq, softirq, steal, …
    except OSError:
        return 0
    return int(fields[8]) if len(fields) > 8 else 0
