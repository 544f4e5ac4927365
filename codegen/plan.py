"""Which kernels and tiles a layer gets: what was measured where something was, else the analytical model.

Nothing above this module knows the vendor of a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from dsmoe_compiler.codegen import candidates, tuned
from dsmoe_compiler.codegen.candidates import AMPLE
from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped, Plan, Problem

__all__ = [
    "Decode",
    "GemmTiles",
    "GemvTiles",
    "Grouped",
    "Plan",
    "Problem",
    "bucket",
    "choose",
    "choose_shared",
]


def bucket(tokens: int) -> int:
    """The power of two at or above: plans are chosen for these numbers of tokens. bucket(0) = 1."""
    return 1 << max(0, tokens - 1).bit_length()


def choose(problem: Problem, gpu: Gpu, triton: str) -> Plan:
    """The plan for a layer: the user's cache, then the committed table, then the analytical model.

    `triton` is the version of Triton ("3.9.0"): measurements count for one minor version.
    """
    return tuned.lookup(problem, gpu, triton) or _for_version(_modelled(problem, gpu), gpu, triton)


def choose_shared(problem: Problem, gpu: Gpu, triton: str) -> Grouped:
    """The plan of a layer's shared experts where they run beside a grouped plan, as one expert that every
    token selects, unsorted. Raises ValueError for a problem without shared experts.
    """
    if problem.shared is None:
        raise ValueError(f"a layer without shared experts: {problem.text}")
    plan = tuned.lookup(problem.shared, gpu, triton)
    if isinstance(plan, Grouped):
        return plan
    modelled = _for_version(_modelled_grouped(problem.shared, gpu), gpu, triton)
    assert isinstance(modelled, Grouped)
    return modelled


def _for_version(plan: Plan, gpu: Gpu, triton: str) -> Plan:
    """The plan as a version of Triton needs it: 3.6 takes some 50 registers more than 3.7 and later for a
    product of biased columns, and none more once it is told the limit.
    """
    early = tuple(map(int, triton.split(".")[:2])) < (3, 7)
    if isinstance(plan, Decode) or not early or gpu.architecture.warp != 32:
        return plan
    return replace(plan, up=_limited(plan.up), down=_limited(plan.down))


def _limited(tiles: GemmTiles) -> GemmTiles:
    return replace(tiles, registers=tiles.registers or AMPLE) if tiles.warps == 8 else tiles


@lru_cache(maxsize=1024)
def _modelled(problem: Problem, gpu: Gpu) -> Plan:
    return candidates.best(problem, gpu)


@lru_cache(maxsize=1024)
def _modelled_grouped(problem: Problem, gpu: Gpu) -> Grouped:
    return candidates.best_grouped(problem, gpu)
