"""The permutation kernels find what a stable sort finds, and cover it with tiles."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmoe_compiler.codegen.kernels.permute import permute_reference, tiles_reference
from dsmoe_compiler.codegen.routing_tiles import PermuteTiles, permute_tiles
from tests.codegen.interpreted import interpreted, interpreter

# What no kernel writes: a place that should have been written and was not shows it.
UNWRITTEN = -7


@dataclass(frozen=True)
class Permuted:
    """Everything that the two launches write: pairs (P,), offsets (E + 1,), tiles (n, 2), counts of them."""

    pairs: Tensor
    offsets: Tensor
    up_tiles: Tensor
    down_tiles: Tensor
    tile_counts: Tensor


def permuted(ids: Tensor, experts: int, tiles: PermuteTiles, up_rows: int, down_rows: int) -> Permuted:
    def table(*shape: int) -> Tensor:
        return torch.full(shape, UNWRITTEN, dtype=torch.int32)

    P, padded = ids.numel(), 1 << (experts - 1).bit_length()
    chunks = -(-P // tiles.chunk)
    counts = table(chunks, experts)
    made = Permuted(
        pairs=table(P),
        offsets=table(experts + 1),
        up_tiles=table(-(-P // up_rows) + experts, 2),
        down_tiles=table(-(-P // down_rows) + experts, 2),
        tile_counts=table(2),
    )
    kernels = interpreted("permute")
    with interpreter():
        kernels.count[(chunks,)](ids, counts, P, E=experts, E_PAD=padded, CHUNK=tiles.chunk)
        kernels.scatter[(chunks,)](
            ids,
            counts,
            *vars(made).values(),
            P,
            chunks,
            E=experts,
            E_PAD=padded,
            CHUNK=tiles.chunk,
            BLOCK=tiles.block,
            COUNT_ROWS=tiles.count_rows,
            TILES=tiles.tiles,
            UP_ROWS=up_rows,
            DOWN_ROWS=down_rows,
        )
    return made


def check(ids: Tensor, experts: int, tiles: PermuteTiles, up_rows: int, down_rows: int) -> None:
    made = permuted(ids, experts, tiles, up_rows, down_rows)
    pairs, offsets = permute_reference(ids, experts)
    assert made.offsets.tolist() == offsets.tolist()
    assert made.pairs[: len(pairs)].tolist() == pairs.tolist()
    assert (made.pairs[len(pairs) :] == UNWRITTEN).all()
    for table, rows, count in (
        (made.up_tiles, up_rows, made.tile_counts[0]),
        (made.down_tiles, down_rows, made.tile_counts[1]),
    ):
        wanted = tiles_reference(offsets, rows)
        assert [tuple(tile) for tile in table[:count].tolist()] == wanted
        assert (table[len(wanted) :] == UNWRITTEN).all()


SMALL = PermuteTiles(chunk=64, block=16, count_rows=2, tiles=4)


@pytest.mark.parametrize(
    "pairs, experts, tiles, up_rows, down_rows, dtype",
    [
        (1, 1, SMALL, 16, 16, torch.int32),
        (63, 3, SMALL, 16, 32, torch.int32),
        (390, 64, permute_tiles(390), 16, 128, torch.int32),
        (1040, 256, permute_tiles(1040), 128, 64, torch.int64),
        (520, 512, SMALL, 64, 16, torch.int32),
    ],
)
def test_pairs_are_sorted_by_expert(
    pairs: int, experts: int, tiles: PermuteTiles, up_rows: int, down_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    # From −1: dropped pairs are among them.
    check(torch.randint(-1, experts, (pairs,), dtype=dtype), experts, tiles, up_rows, down_rows)


def test_all_on_one_expert() -> None:
    check(torch.full((200,), 5), 7, SMALL, 16, 32)


def test_all_dropped() -> None:
    check(torch.full((70,), -1), 7, SMALL, 16, 32)


def test_ids_that_name_no_expert_are_dropped() -> None:
    # 3 is within the padded experts, the last one is 1 in its lower half; no kernel may write there.
    check(torch.tensor([0, 3, 2, 4, -2, 1 << 30, -(1 << 31), 1, (1 << 32) + 1]), 3, SMALL, 16, 16)


def test_the_worked_example() -> None:
    ids = torch.tensor([2, 0, 0, 1, 0, 2, 1, -1])
    made = permuted(ids, 3, PermuteTiles(chunk=4, block=2, count_rows=1, tiles=2), 2, 4)
    assert made.pairs.tolist() == [1, 2, 4, 3, 6, 0, 5, UNWRITTEN]
    assert made.offsets.tolist() == [0, 3, 5, 7]
    assert made.up_tiles[: made.tile_counts[0]].tolist() == [[0, 0], [0, 2], [1, 3], [2, 5]]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_any_routing(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 512) | st.sampled_from([1, 2, 64, 511, 512]))
    pairs = data.draw(st.integers(1, 1500))
    known = data.draw(st.integers(1, experts))
    block = 1 << data.draw(st.integers(0, 6))
    tiles = PermuteTiles(
        chunk=max(64, block) << data.draw(st.integers(0, 3)),
        block=block,
        count_rows=1 << data.draw(st.integers(0, 4)),
        tiles=1 << data.draw(st.integers(0, 5)),
    )
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    ids = torch.randint(-1, known, (pairs,), dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    rows = st.sampled_from([1, 16, 64, 128])
    check(ids, experts, tiles, data.draw(rows), data.draw(rows))
