"""Block sizes around the experts cover every size, and fit."""

from itertools import product

import pytest

from dsmoe_compiler.codegen.routing_tiles import combine_columns, permute_tiles, route_tiles

# Processors, and bytes of shared memory of a program: an H200, an RTX 4090, an MI300X, the interpreter.
MACHINES = [(132, 227 << 10), (128, 99 << 10), (304, 64 << 10), (1, 227 << 10)]


def is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("processors, shared", MACHINES)
def test_routing_covers_all_and_fits(processors: int, shared: int) -> None:
    all_tokens = (1, 2, 7, 16, 17, 64, 1000, 4096, 100_000)
    for tokens, experts, item in product(all_tokens, (1, 3, 8, 60, 256, 512), (2, 4)):
        columns = max(16, 1 << (experts - 1).bit_length())
        tiles = route_tiles(
            tokens,
            experts=experts,
            columns=columns,
            operand_bytes=item,
            processors=processors,
            shared=shared,
        )
        case = f"{tokens} tokens, {experts} experts, {item} bytes: {tiles}"
        sizes = (tiles.tokens, tiles.experts, tiles.depth, tiles.warps)
        assert all(is_power(size) for size in sizes), case
        blocks, parts = tiles.grid(tokens, experts)
        assert blocks * tiles.tokens >= tokens and parts * tiles.experts >= experts, case
        assert tiles.split or tiles.experts == columns, case
        # A thread's part of the logits, and of the sums of a product without tensor cores.
        assert tiles.tokens * columns <= 32 * 32 * tiles.warps, case
        if tiles.dot:
            assert min(tiles.tokens, tiles.experts) >= 16, case
            step = (tiles.tokens + tiles.experts) * tiles.depth * item
            assert step * tiles.stages < shared, case
        else:
            assert tiles.tokens * tiles.experts * tiles.depth <= 32 * 32 * tiles.warps, case


def test_who_cannot_see_other_warps_stores_has_one_warp() -> None:
    facts = dict(experts=256, columns=256, operand_bytes=2, processors=304, shared=64 << 10)
    for tokens in (1, 16, 64, 16384):
        tiles = route_tiles(tokens, **facts, barrier_orders_stores=False)
        assert (tiles.warps == 1) == tiles.split


def test_permutation_steps_are_balanced() -> None:
    for pairs in (1, 6, 512, 4096, 131_072, 1 << 20):
        tiles = permute_tiles(pairs)
        assert is_power(tiles.chunk) and tiles.chunk % tiles.block == 0
        own, others = tiles.chunk / tiles.block, pairs / tiles.chunk / tiles.count_rows
        assert tiles.chunk in (64, 4096) or 1 / 4 <= own / others <= 4


def test_combine_reads_no_more_columns_than_there_are() -> None:
    assert [combine_columns(hidden) for hidden in (1, 33, 2048, 7168)] == [1, 64, 1024, 1024]
