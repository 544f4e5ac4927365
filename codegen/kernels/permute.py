"""Permutation: the pairs in the order of their experts, and the tiles that cover every expert's rows.

Two launches over chunks of the pairs, the second reading what the first counted; the host learns nothing. No
atomics: a pair's place follows from counts alone, so the order is stable and the same every time.

Four tokens, K = 2, E = 3, chunks of 4 pairs, tiles of 2 rows; the last pair was dropped:

    ids      [2, 0, 0, 1 | 0, 2, 1, -1]
    counts   [[2, 1, 1], [1, 1, 1]]                 of every expert in every chunk
    offsets  [0, 3, 5, 7]                           of every expert's rows
    pairs    [1, 2, 4 | 3, 6 | 0, 5]                row r is pair pairs[r], of token pairs[r] // K
    tiles    [(0, 0), (0, 2), (1, 3), (2, 5)]       (expert, first row)

The second chunk's pair of expert 0 goes to row 0 + 2: the expert's offset, and its pairs in chunks before.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["P"])
def count(
    ids,  # [P]
    counts,  # int32 [chunks, E]
    P,
    E: tl.constexpr,
    E_PAD: tl.constexpr,  # the power of two ≥ E
    CHUNK: tl.constexpr,  # pairs
):
    """The pairs of every expert in one chunk. Grid: (chunks,)."""
    chunk = tl.program_id(0)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + pairs, mask=pairs < P, other=-1)
    routed = (expert >= 0) & (expert < E)
    found = tl.histogram(expert.to(tl.int32), E_PAD, mask=routed)
    columns = tl.arange(0, E_PAD)
    tl.store(counts + chunk * E + columns, found, mask=columns < E)


# Not P: where it is no multiple of 16, ptxas takes 80 registers for E = 128 and spills two.
@triton.jit(do_not_specialize=["chunks"])
def scatter(
    ids,  # [P]
    counts,  # int32 [chunks, E]
    pairs,  # int32 [P]: the first offsets[E] are written
    offsets,  # int32 [E + 1]
    up_tiles,  # int32 [cdiv(P, UP_ROWS) + E, 2]: the first tile_counts[0] are written
    down_tiles,  # int32 [cdiv(P, DOWN_ROWS) + E, 2]: the first tile_counts[1] are written
    tile_counts,  # int32 [2]
    P,
    chunks,
    E: tl.constexpr,
    E_PAD: tl.constexpr,  # the power of two ≥ E
    CHUNK: tl.constexpr,  # pairs; a multiple of BLOCK
    BLOCK: tl.constexpr,  # pairs that are compared with one another
    COUNT_ROWS: tl.constexpr,  # rows of the counts that are read at a time
    TILES: tl.constexpr,  # tiles that are written at a time
    UP_ROWS: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
):
    """The pairs of one chunk to their places, and every chunk's share of the tables. Grid: (chunks,)."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, E_PAD)

    # Every program adds up the whole table: it is small, and saves a launch.
    total = tl.zeros([E_PAD], dtype=tl.int32)
    before = tl.zeros([E_PAD], dtype=tl.int32)
    for first in range(0, chunks, COUNT_ROWS):
        row = first + tl.arange(0, COUNT_ROWS)
        found = tl.load(
            counts + row[:, None] * E + experts[None, :],
            mask=(row[:, None] < chunks) & (experts[None, :] < E),
            other=0,
        )
        total += tl.sum(found, axis=0)
        before += tl.sum(tl.where(row[:, None] < chunk, found, 0), axis=0)
    offset = tl.cumsum(total, axis=0) - total

    # The row that each expert's next pair goes to.
    next_row = offset + before
    for first in range(0, CHUNK, BLOCK):
        pair = chunk * CHUNK + first + tl.arange(0, BLOCK)
        expert = tl.load(ids + pair, mask=pair < P, other=-1)
        routed = (expert >= 0) & (expert < E)
        expert = tl.where(routed, expert, 0).to(tl.int32)
        same = (expert[:, None] == expert[None, :]) & (pair[:, None] > pair[None, :]) & routed[None, :]
        rank = tl.sum(same.to(tl.int32), axis=1)
        tl.store(pairs + tl.gather(next_row, expert, 0) + rank, pair, mask=routed)
        next_row += tl.histogram(expert, E_PAD, mask=routed)

    up_count = write_tiles(
        tiles=up_tiles,
        total=total,
        offset=offset,
        E_PAD=E_PAD,
        TILES=TILES,
        ROWS=UP_ROWS,
    )
    down_count = write_tiles(
        tiles=down_tiles,
        total=total,
        offset=offset,
        E_PAD=E_PAD,
        TILES=TILES,
        ROWS=DOWN_ROWS,
    )
    if chunk == 0:
        tl.store(offsets + experts, offset, mask=experts < E)
        tl.store(offsets + E, tl.sum(total, axis=0))
        tl.store(tile_counts, up_count)
        tl.store(tile_counts + 1, down_count)


@triton.jit
def write_tiles(
    tiles,
    total,  # [E_PAD], rows of every expert
    offset,  # [E_PAD], its first
    E_PAD: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """This program's share of the tiles (expert, first row), of ROWS rows each but an expert's last one.

    Returns the number of all tiles.
    """
    experts = tl.arange(0, E_PAD)
    needed = (total + ROWS - 1) // ROWS
    end = tl.cumsum(needed, axis=0)
    start = end - needed
    tile_count = tl.sum(needed, axis=0)
    for first in range(tl.program_id(0) * TILES, tile_count, tl.num_programs(0) * TILES):
        tile = first + tl.arange(0, TILES)
        # Tiles are numbered in the order of the experts: a tile is of the one whose range holds its number.
        holds = (start[None, :] <= tile[:, None]) & (tile[:, None] < end[None, :])
        expert = tl.sum(tl.where(holds, experts[None, :], 0), axis=1)
        row = offset[None, :] + (tile[:, None] - start[None, :]) * ROWS
        first_row = tl.sum(tl.where(holds, row, 0), axis=1)
        tl.store(tiles + tile * 2, expert, mask=tile < tile_count)
        tl.store(tiles + tile * 2 + 1, first_row, mask=tile < tile_count)
    return tile_count


def permute_reference(ids_P: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `count` and `scatter` find, in torch: pairs (offsets[E],) and offsets (E + 1,), int64."""
    routed_P = (ids_P >= 0) & (ids_P < experts)
    order_P = torch.argsort(torch.where(routed_P, ids_P, experts), stable=True)
    totals_E = torch.bincount(ids_P[routed_P].long(), minlength=experts)
    offsets = torch.cat([totals_E.new_zeros(1), totals_E.cumsum(0)])
    return order_P[: int(offsets[-1])], offsets


def tiles_reference(offsets: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """The tiles (expert, first row) over experts whose rows begin at `offsets` (E + 1,), one by one."""
    ends = offsets.tolist()
    return [
        (expert, first)
        for expert in range(len(ends) - 1)
        for first in range(ends[expert], ends[expert + 1], rows)
    ]
