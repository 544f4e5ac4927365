"""A covering set: few cases in which any two choices of different factors meet."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Case = dict[str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True, tries: int = 40
) -> list[Case]:
    """Cases that together hold every pair of choices that some allowed case holds; greedy, and always the
    same.

    Of `tries` random cases for a pair that is still missing, the one that covers most missing pairs is taken.
    """
    drawn = random.Random(0)
    missing = {
        frozenset({(a, i), (b, j)})
        for a, b in combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = list[Case]()
    while missing:
        wanted = min(missing, key=sorted)
        best: tuple[int, dict[str, int]] | None = None
        for _ in range(tries):
            at = {name: drawn.randrange(len(choices)) for name, choices in factors.items()} | dict(wanted)
            if allowed({name: factors[name][i] for name, i in at.items()}):
                gain = len(missing & _pairs(at))
                best = max(best or (0, at), (gain, at), key=lambda found: found[0])
        if best is None:
            missing.discard(wanted)  # no allowed case holds it
            continue
        missing -= _pairs(best[1])
        cases.append({name: factors[name][i] for name, i in best[1].items()})
    return cases


def _pairs(at: Mapping[str, int]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(pair) for pair in combinations(at.items(), 2)}
