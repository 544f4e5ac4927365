"""The analytical model: what it is made of is right, and what it ranks first is plausible and fits."""

from dataclasses import replace
from itertools import combinations, product
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_compiler.codegen import analytical, candidates
from dsmoe_compiler.codegen.gpu import A100, GPUS, H200, MI300X, RTX_4090, Gpu
from dsmoe_compiler.codegen.plan import Decode, GemmTiles, Grouped, Problem
from dsmoe_compiler.codegen.uniform import active_experts, row_tiles
from tests.codegen.shapes import SHAPES, TOKENS, floor, layer


def by_enumeration(tokens: int, experts: int, top_k: int, rows: int) -> tuple[float, float]:
    """Active experts and row tiles, averaged over every routing there is."""
    routings = list(product(combinations(range(experts), top_k), repeat=tokens))
    active = tiles = 0
    for routing in routings:
        counts = [sum(expert in chosen for chosen in routing) for expert in range(experts)]
        active += sum(count > 0 for count in counts)
        tiles += sum(ceil(count / rows) for count in counts)
    return active / len(routings), tiles / len(routings)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "rows"), [(3, 4, 2, 2), (4, 3, 1, 3), (5, 3, 2, 2)])
def test_uniform_routing_is_what_enumeration_says(tokens: int, experts: int, top_k: int, rows: int) -> None:
    active, tiles = by_enumeration(tokens, experts, top_k, rows)
    assert active_experts(tokens, experts, top_k) == pytest.approx(active)
    assert row_tiles(tokens, experts, top_k, rows) == pytest.approx(tiles)


@given(st.integers(1, 5000), st.integers(1, 300), st.data())
@settings(max_examples=50)
def test_row_tiles_lie_between_the_pairs_and_their_padding(
    tokens: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, min(experts, 16)))
    rows = data.draw(st.sampled_from([16, 32, 64, 128]))
    assert row_tiles(tokens, experts, top_k, 1) == pytest.approx(tokens * top_k)
    tiles = row_tiles(tokens, experts, top_k, rows)
    active = active_experts(tokens, experts, top_k)
    assert max(active, tokens * top_k / rows) - 1e-6 <= tiles <= tokens * top_k / rows + active + 1e-6


@pytest.mark.parametrize(
    ("tiles", "gpu", "registers", "shared_kb"),
    [
        (GemmTiles(128, 128, 64, 8, 4, tma=True), H200, 169, 192),
        (GemmTiles(64, 128, 64, 8, 3, tma=True), H200, 97, 120),
        (GemmTiles(32, 128, 64, 4, 3, swap=True, tma=True), H200, 95, 108),
        (GemmTiles(16, 64, 128, 4, 3, tma=True), H200, 96, 72),
        (GemmTiles(64, 128, 64, 8, 4), A100, 172, 120),
        (GemmTiles(16, 128, 64, 4, 4), A100, 128, 102),
        (GemmTiles(64, 64, 64, 8, 2), MI300X, 116, 24),
    ],
)
def test_resources_are_near_the_compiled_kernels(
    tiles: GemmTiles, gpu: Gpu, registers: int, shared_kb: int
) -> None:
    """Against what Triton 3.9 made of the up kernel with gate and up."""
    up = analytical.up(layer("deepseek-moe-16b", 4096))
    assert analytical.gemm_shared(tiles, up, gpu) == shared_kb * 1024
    assert analytical.gemm_registers(tiles, up, gpu) == pytest.approx(registers, rel=0.35)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_predictions_lie_between_the_floor_and_its_double(shape: str, tokens: int) -> None:
    problem = layer(shape, tokens)
    seconds, _ = candidates.ranked(problem, H200)[0]
    assert 1 <= seconds / floor(problem, H200) <= 2


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_gpu_is_predicted_to_beat_its_floor(gpu: Gpu) -> None:
    for shape, tokens in product(SHAPES, TOKENS):
        problem = layer(shape, tokens)
        assert candidates.ranked(problem, gpu)[0][0] >= floor(problem, gpu)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_ends_about_where_half_the_experts_have_a_pair(shape: str) -> None:
    for tokens in TOKENS:
        problem = layer(shape, tokens)
        plan = candidates.best(problem, H200)
        if problem.pairs <= problem.experts / 4:
            assert isinstance(plan, Decode)
        if problem.pairs >= problem.experts:
            assert isinstance(plan, Grouped)


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_on_hopper_gets_large_tiles_and_few_tokens_small_ones(shape: str) -> None:
    few, many = (
        candidates.best_grouped(layer(shape, 64), H200),
        candidates.best_grouped(layer(shape, 16384), H200),
    )
    for tiles in (many.up, many.down):
        assert (tiles.rows, tiles.warps, tiles.tma, tiles.swap) == (128, 8, True, False)
    for tiles in (few.up, few.down):
        assert tiles.rows <= 32


def tiles_of(problem: Problem, gpu: Gpu) -> list[GemmTiles]:
    plans = [plan for _, plan in candidates.ranked(problem, gpu) if isinstance(plan, Grouped)]
    return [tiles for plan in plans for tiles in (plan.up, plan.down)]


def test_tiles_keep_the_limits_that_compilers_were_seen_to_have() -> None:
    shared_kb = {H200: 192, A100: 160, MI300X: 64, RTX_4090: 99}
    for gpu, dtype, tokens in product(shared_kb, ("bfloat16", "float32"), (8, 512, 16384)):
        problem = layer("deepseek-moe-16b", tokens, dtype)
        for tiles in tiles_of(problem, gpu):
            held = analytical.gemm_shared(tiles, analytical.down(problem), gpu)
            assert held <= shared_kb[gpu] * 1024
            sums = tiles.rows * tiles.columns / tiles.warps / gpu.architecture.warp
            assert sums <= (128 if gpu in (H200, MI300X) else 64)
            assert not tiles.tma or gpu is H200
            assert not tiles.swap or (gpu is H200 and tiles.columns >= 64)
            if gpu is MI300X:
                assert tiles.stages == 2
            if dtype == "float32" and gpu is not MI300X:
                assert tiles.rows <= 64 and tiles.columns <= 64 and sums <= 32 and not tiles.tma


def test_descriptors_are_used_where_the_layout_allows_them() -> None:
    problem = layer("deepseek-moe-16b", 64)
    assert any(tiles.swap for tiles in tiles_of(problem, H200))
    assert all(tiles.tma for tiles in tiles_of(problem, H200))
    assert not any(tiles.tma for tiles in tiles_of(replace(problem, tma=False), H200))
    assert any(tiles.columns > 128 for tiles in tiles_of(problem, H200))
    ups = [
        p.up for _, p in candidates.ranked(replace(problem, interleaved=True), H200) if isinstance(p, Grouped)
    ]
    assert all(tiles.columns <= 128 for tiles in ups)


def test_tiles_of_transposed_matrices_are_lines_along_the_outputs() -> None:
    for tokens, dtype in product((1, 64, 4096), ("bfloat16", "float32")):
        lying = replace(layer("gpt-oss-120b", tokens, dtype), up_transposed=True, down_transposed=True)
        for _, plan in candidates.ranked(lying, H200):
            for tiles in (plan.up, plan.down):
                assert tiles.columns * lying.item >= 128
    few = replace(layer("gpt-oss-120b", 1), up_transposed=True)
    ups = {plan.up.columns for _, plan in candidates.ranked(few, H200) if isinstance(plan, Decode)}
    downs = {plan.down.columns for _, plan in candidates.ranked(few, H200) if isinstance(plan, Decode)}
    assert min(ups) >= 64 > min(downs)


def test_what_the_epilogue_reads_beside_leaves_fewer_registers_to_sums() -> None:
    even, uneven = layer("deepseek-v3", 16384), layer("gpt-oss-120b", 16384)
    assert max(tiles.rows * tiles.columns for tiles in tiles_of(even, H200)) == 128 * 256
    for problem in (uneven, replace(even, biased=True)):
        assert max(t.rows * t.columns / t.warps / 32 for t in tiles_of(problem, H200)) == 64
    assert candidates.best_grouped(even, H200).up.registers == 200
    assert candidates.best_grouped(replace(even, biased=True), H200).up.registers == 0


def test_a_persistent_grid_is_resident_all_at_once() -> None:
    for shape, tokens in product(SHAPES, TOKENS):
        problem = layer(shape, tokens)
        for _, plan in candidates.ranked(problem, H200):
            if isinstance(plan, Grouped):
                held = [
                    analytical.gemm_resident(plan.up, analytical.up(problem), H200),
                    analytical.gemm_resident(plan.down, analytical.down(problem), H200),
                ]
                assert 0 < plan.programs <= H200.processors * min(held)


@pytest.mark.parametrize("fact", ["memory_rate", "l2", "l2_rate", "matmul_rate", "float32_rate"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_faster_gpu_is_never_predicted_slower(fact: str, tokens: int) -> None:
    faster = replace(H200, **{fact: 2 * getattr(H200, fact)})
    problem = layer("qwen3-30b-a3b", tokens)
    assert candidates.ranked(problem, faster)[0][0] <= candidates.ranked(problem, H200)[0][0]


@pytest.mark.parametrize(("tokens", "read_again"), [(16384, True), (2048, False)])
def test_an_expert_that_outgrows_l2_is_read_again_by_groups(tokens: int, read_again: bool) -> None:
    """Of 16384 tokens one of Mixtral's experts has 32 row tiles, which are four groups; of 2048 it has four
    tiles.
    """
    slow = replace(H200, memory_rate=H200.memory_rate / 8)
    tiles = GemmTiles(128, 128, 64, 8, 4, tma=True)
    up = analytical.up(layer("mixtral-8x7b", tokens))
    outgrown, held = (replace(slow, l2=int(up.expert_bytes) + spare) for spare in (-1, 1))
    seconds = [analytical.gemm_seconds(tiles, up, gpu, resident=1) for gpu in (outgrown, held)]
    assert (seconds[0] > 1.05 * seconds[1]) == read_again


def test_odd_sizes_have_plans() -> None:
    sizes = [(1, 1, 1, 1), (8, 24, 3, 2), (130, 34, 60, 8), (4096, 257, 8, 8), (7, 100_000, 2, 1)]
    for (hidden, width, experts, top_k), tokens, taps in product(sizes, (1, 32, 1024), (1, 2)):
        for gpu, dtype in product((H200, MI300X), ("float16", "float32")):
            problem = Problem(tokens, hidden, width, experts, top_k, taps, dtype, shared_width=3)
            seconds, _ = candidates.ranked(problem, gpu)[0]
            assert 0 < seconds < 1
