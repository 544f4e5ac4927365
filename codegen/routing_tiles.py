"""Block sizes of the kernels around the experts: routing, permutation, combine.

They move little beside the experts' weights, so a rule of thumb each is enough: as many programs as
processors, at most 32 numbers of a block in a thread's registers, stages that fit in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

# At least so many rows and columns has a block that a matrix product takes.
DOT_ROWS = 16
# Numbers of a block's fp32 accumulator that a warp of 32 holds, 32 a thread.
_PER_WARP = 1024
# Bytes of a row that a step takes, and steps under way, best first.
_STEPS = ((256, 4), (128, 4), (128, 3), (64, 4), (64, 3), (32, 3), (32, 2))
# Bytes of shared memory that reductions and changes of layout take.
_SCRATCH = 8192


@dataclass(frozen=True)
class RouteTiles:
    """Of `kernels/route.py`: what one program takes, in tokens, experts and columns of D a step."""

    tokens: int
    experts: int
    depth: int
    warps: int
    stages: int
    split: bool
    dot: bool

    def constants(self) -> dict[str, object]:
        """The kernel's constants that these sizes are."""
        return {
            "SPLIT": self.split,
            "DOT": self.dot,
            "BLOCK_T": self.tokens,
            "BLOCK_E": self.experts,
            "BLOCK_D": self.depth,
            "STAGES": self.stages,
        }

    def grid(self, tokens: int, experts: int) -> tuple[int, int]:
        """Programs over T tokens and E experts; where they are split, the first is also how many arrivals
        are counted.
        """
        return _parts(tokens, self.tokens), _parts(experts, self.experts) if self.split else 1


def route_tiles(
    tokens: int,
    *,
    experts: int,
    columns: int,
    operand_bytes: int,
    processors: int,
    shared: int,
    barrier_orders_stores: bool = True,
) -> RouteTiles:
    """Tiles for T `tokens` and E `experts` that lie in `columns`, on a GPU with so many `processors`.

    `operand_bytes` is the size of the wider of x's and the weight's numbers, `shared` the bytes of shared
    memory that a program may have; `barrier_orders_stores`: see `kernels/arrive.py`.
    """
    few = tokens <= DOT_ROWS
    # Larger blocks read the weights less often, but there should be about one for every processor.
    rows = _power(tokens if few else 3 * tokens // (4 * processors))
    lowest, highest = (1, 8) if few else (DOT_ROWS, 64)
    rows = _within(rows, lowest, max(lowest, min(highest, 8 * _PER_WARP // columns)))
    warps = _within(_power(_parts(rows * columns, _PER_WARP)), 4, 8)
    blocks = _parts(tokens, rows)
    if few:
        share = _share(experts, blocks, processors, lowest=1, highest=8)
        depth, stages = min(1024, 4 * _PER_WARP // (rows * share)), 3
    else:
        share = _share(columns, blocks, processors, lowest=DOT_ROWS, highest=columns)
        fitting = (s for s in _STEPS if (rows + share) * s[0] * s[1] <= shared - _SCRATCH)
        step_bytes, stages = next(fitting, _STEPS[-1])
        depth = step_bytes // operand_bytes
    split = few or share < columns
    if split and not barrier_orders_stores:
        warps = 1
    return RouteTiles(rows, share, depth, warps, stages, split=split, dot=not few)


@dataclass(frozen=True)
class PermuteTiles:
    """Of `kernels/permute.py`: pairs of a chunk, and pairs of a chunk that are compared with one another."""

    chunk: int
    block: int = 64
    count_rows: int = 8
    tiles: int = 8
    count_warps: int = 4
    scatter_warps: int = 8


def permute_tiles(pairs: int) -> PermuteTiles:
    """Tiles for P `pairs`.

    A program of `scatter` goes through the counts of P / chunk chunks, 8 at a time, and through its own
    chunk, 64 pairs at a time: both take as many steps where chunk² = 8 P.
    """
    return PermuteTiles(chunk=_within(_power(isqrt(8 * pairs)), 64, 4096))


def combine_columns(hidden: int) -> int:
    """Columns of D that a program of `kernels/combine.py` sums, with 4 warps: 16 bytes a thread and load of
    a 16-bit row.
    """
    return min(1024, _power(hidden))


def _share(experts: int, blocks: int, processors: int, lowest: int, highest: int) -> int:
    """Experts of a program when `blocks` blocks of tokens are spread over the processors: a power of two."""
    wanted = _parts(experts * blocks, processors)
    return _within(_power(wanted), lowest, min(highest, _power(experts)))


def _within(n: int, lowest: int, highest: int) -> int:
    return max(lowest, min(n, highest))


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _power(n: int) -> int:
    """The power of two ≥ n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()
