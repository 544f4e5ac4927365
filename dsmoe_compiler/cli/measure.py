"""Which of several calls is faster: rounds that alternate between them, and the median of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """The seconds of every measured round of one call, in order; none is left out."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.seconds)


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget_seconds: float,
    warm_up: int = 2,
    least_rounds: int = 5,
    most_rounds: int = 50,
) -> dict[str, Timing]:
    """Time each call once a round, until the budget is spent: a machine that slows down slows them all.

    The order turns around from round to round, so that none always follows the same other. `warm_up` rounds
    come before the measured ones; `least_rounds` are measured even when the budget is spent.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up):
        for call in calls.values():
            call()
    end = time.perf_counter() + budget_seconds
    for round_number in range(most_rounds):
        if round_number >= least_rounds and time.perf_counter() > end:
            break
        names = list(calls) if round_number % 2 == 0 else list(calls)[::-1]
        for name in names:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
