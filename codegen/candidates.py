"""The plans worth considering for a problem, best first by the analytical model.

Tiles that the compilers are known to handle badly are left out here: more accumulators than registers,
products of fewer than 16 rows, swapped operands without warp-group products to gain from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product as every
from typing import TypeVar

from dsmoe_compiler.codegen import analytical
from dsmoe_compiler.codegen.analytical import Product
from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped, Plan, Problem

# How many of each launch's best tiles are combined.
_KEPT = 4
# Registers a thread of eight warps that the largest tiles were seen to do with. Left alone, Triton 3.6 takes
# all there are for the same code.
AMPLE = 200
# Blocks a processor that a persistent grid is laid out for.
_RESIDENT = (1, 2, 3, 4)


# What the model cannot tell apart: within this factor the plan of fewer launches is taken, which puts the end
# of decoding at about T·K = E/2.
_DOUBT = 1.1


def best(problem: Problem, gpu: Gpu) -> Plan:
    """The plan that the model ranks first; a decode plan also where it is nearly the first."""
    plans = ranked(problem, gpu)
    decode, seconds = next((plan, seconds) for seconds, plan in plans if isinstance(plan, Decode))
    return decode if seconds <= _DOUBT * plans[0][0] else plans[0][1]


def best_grouped(problem: Problem, gpu: Gpu) -> Grouped:
    """The grouped plan that the model ranks first."""
    return min(_grouped(problem, gpu), key=lambda each: each[0])[1]


@lru_cache(maxsize=256)
def ranked(problem: Problem, gpu: Gpu) -> tuple[tuple[float, Plan], ...]:
    """(predicted seconds, plan) of the plans worth measuring, best first; never empty."""
    plans: list[tuple[float, Plan]] = [*_decode(problem, gpu), *_grouped(problem, gpu)]
    return tuple(sorted(plans, key=lambda each: each[0]))


def predicted(plan: Plan, problem: Problem, gpu: Gpu) -> float:
    """Seconds of a layer with any plan, by the analytical model."""
    if isinstance(plan, Decode):
        up = analytical.gemv_up_seconds(plan.up, problem, gpu)
        return up + analytical.gemv_down_seconds(plan.down, problem, gpu)
    resident = max(1, plan.programs // gpu.processors)
    up = analytical.gemm_seconds(plan.up, analytical.up(problem), gpu, resident)
    down = analytical.gemm_seconds(plan.down, analytical.down(problem), gpu, resident)
    return up + down + _beside_products(problem, gpu)


def _decode(problem: Problem, gpu: Gpu) -> list[tuple[float, Decode]]:
    ups = [
        (analytical.gemv_up_seconds(tiles, problem, gpu), tiles)
        for tiles in _gemv_tiles(problem, gpu, problem.taps, (1, 2, 4, 8), problem.up_transposed)
    ]
    downs = [
        (analytical.gemv_down_seconds(tiles, problem, gpu), tiles)
        for tiles in _gemv_tiles(problem, gpu, 2, (1,), problem.down_transposed)
    ]
    return [(a + b, Decode(u, d)) for (a, u), (b, d) in every(_fastest(ups), _fastest(downs))]


def _grouped(problem: Problem, gpu: Gpu) -> list[tuple[float, Grouped]]:
    rest = _beside_products(problem, gpu)
    return [(seconds + rest, plan) for seconds, plan in _products(problem, gpu)]


def _beside_products(problem: Problem, gpu: Gpu) -> float:
    """What a grouped plan takes beside its own two products, the shared experts included."""
    shared = 0.0
    if problem.shared is not None:
        # Its two products only: nothing to permute, and the layer's combine adds its result.
        shared = min(_products(problem.shared, gpu), key=lambda each: each[0])[0]
    return shared + analytical.grouped_rest_seconds(problem, gpu)


def _products(problem: Problem, gpu: Gpu) -> list[tuple[float, Grouped]]:
    """Up and down, for every number of resident blocks that some tiles of both allow."""
    plans = []
    for resident in _RESIDENT:
        ups = _best_gemm(analytical.up(problem), gpu, resident)
        downs = _best_gemm(analytical.down(problem), gpu, resident)
        programs = gpu.processors * resident
        plans += [(a + b, Grouped(u, d, programs)) for (a, u), (b, d) in every(ups, downs)]
    return plans


def _best_gemm(product: Product, gpu: Gpu, resident: int) -> list[tuple[float, GemmTiles]]:
    timed = [
        (analytical.gemm_seconds(tiles, product, gpu, resident), tiles)
        for tiles, held in _gemm_tiles(product, gpu)
        if held >= resident
    ]
    return _fastest(timed)


@lru_cache(maxsize=64)
def _gemm_tiles(product: Product, gpu: Gpu) -> tuple[tuple[GemmTiles, int], ...]:
    """Tiles that fit, and how many blocks of each a processor holds."""
    found = []
    for tiles in _gemm_shapes(product, gpu):
        held = analytical.gemm_resident(tiles, product, gpu)
        if held:
            found.append((tiles, held))
    return tuple(found)


def _gemm_shapes(product: Product, gpu: Gpu) -> Iterator[GemmTiles]:
    problem, arch = product.problem, gpu.architecture
    if analytical.multiply_adds(problem, gpu):
        yield from _multiply_add_shapes(problem)
        return
    tma = problem.tma and arch.descriptors
    all_rows = [r for r in (16, 32, 64, 128) if r <= max(16, problem.tokens)]
    # Gate and up in alternate columns are one tile, of no more rows than a descriptor's block can have.
    widest = 256 // product.taps if problem.interleaved else 256
    # What lies side by side in a tile is one line of memory, 128 bytes, or more.
    line = 128 // problem.item
    narrowest = line if product.transposed else 32
    needed = min(widest, max(narrowest, _power(product.columns)))
    all_columns = [c for c in (32, 64, 128, 256) if narrowest <= c <= needed]
    all_depths = (line, 2 * line)
    all_stages = (3, 4, 5) if arch.multistage else (2,)
    for rows, columns, depth, warps, stages in every(all_rows, all_columns, all_depths, (4, 8), all_stages):
        plain = GemmTiles(rows, columns, depth, warps, stages, tma=tma)
        # Masks of columns and biases take registers of their own: large accumulators were seen to spill.
        masked = problem.biased or product.columns % columns != 0
        if masked and rows * columns > 64 * warps * arch.warp:
            continue
        crowded = warps == 8 and analytical.gemm_registers(plain, product, gpu) > AMPLE
        bounded = crowded and arch.warp == 32 and not problem.biased
        yield replace(plain, registers=AMPLE) if bounded else plain
        swap = replace(plain, swap=True)
        if rows < 64 and analytical.warp_group(swap, problem, gpu):
            yield swap


def _multiply_add_shapes(problem: Problem) -> Iterator[GemmTiles]:
    """For float32 without tensor cores, where a dot is unrolled into multiply-adds: small tiles, by pointers.
    From tiles as descriptors leave them the same dot takes half as many registers again, or spills.
    """
    shapes = ((16, 32, 4), (16, 64, 4), (32, 32, 4), (32, 64, 4), (64, 64, 8))
    for (rows, columns, warps), stages in every(shapes, (3, 4)):
        if rows <= max(16, problem.tokens):
            yield GemmTiles(rows, columns, 32, warps, stages)


def _gemv_tiles(
    problem: Problem, gpu: Gpu, sums: int, splits: tuple[int, ...], transposed: bool
) -> Iterator[GemvTiles]:
    along, across = (64, 128, 256, 512), (4, 8, 16, 32, 64)
    all_columns, all_depths = (along, across) if transposed else (across, along)
    # Only loads that feed a dot are pipelined: one stage.
    for columns, depth, warps, split in every(all_columns, all_depths, (4, 8), splits):
        tiles = GemvTiles(columns, depth, warps, stages=1, split=split)
        # Programs of several warps can only share a reduction where one sees all that another stored.
        shareable = split == 1 or gpu.architecture.barrier_orders_stores
        if shareable and analytical.gemv_resident(tiles, sums, problem.item, gpu):
            yield tiles


_Tiles = TypeVar("_Tiles")


def _fastest(timed: list[tuple[float, _Tiles]]) -> list[tuple[float, _Tiles]]:
    return sorted(timed, key=lambda each: each[0])[:_KEPT]


def _power(size: int) -> int:
    """The power of two at or above."""
    return 1 << (size - 1).bit_length()
