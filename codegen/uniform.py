"""What uniform routing makes of T tokens: how many experts get work, and in how many tiles.

Each token selects K distinct experts of E, so that an expert's number of tokens is binomial:
n ~ Binomial(T, K/E).
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, lgamma, log, sqrt


def active_experts(tokens: int, experts: int, top_k: int) -> float:
    """The expected number of experts that get at least one token: E·(1 − (1 − K/E)^T)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@lru_cache(maxsize=4096)
def row_tiles(tokens: int, experts: int, top_k: int, rows: int) -> float:
    """The expected number of tiles of `rows` tokens: E·E[⌈n/rows⌉], with E[⌈n/rows⌉] = Σ_j P(n > j·rows)."""
    if top_k == experts:
        return experts * float(-(-tokens // rows))
    share = top_k / experts
    # Beyond twelve deviations nothing is left in a float's precision.
    spread = 12 * sqrt(tokens * share * (1 - share)) + 12
    first = max(0, int(tokens * share - spread))
    last = min(tokens, int(tokens * share + spread))
    expected = sum(_binomial(n, tokens, share) * -(-n // rows) for n in range(first, last + 1))
    return experts * expected


def _binomial(n: int, tokens: int, share: float) -> float:
    ways = lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
    return exp(ways + n * log(share) + (tokens - n) * log(1 - share))
