"""GPUs are known by name and number of processors, and estimated where they are not."""

from types import SimpleNamespace
from typing import Any

import pytest

from dsmoe_compiler.codegen.architecture import ARCHITECTURES, architecture
from dsmoe_compiler.codegen.gpu import A100, GPUS, H100, H200, MI300X, for_target, from_properties


def properties(**given: Any) -> SimpleNamespace:
    """What torch says of an H100 with 80 GB, but for `given`."""
    h100 = dict(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        gcnArchName="NVIDIA H100 80GB HBM3",
        multi_processor_count=132,
        warp_size=32,
        L2_cache_size=50 << 20,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        max_threads_per_multi_processor=2048,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block_optin=232448,
    )
    return SimpleNamespace(**{**h100, **given})


def test_the_catalogues_products_are_known_by_name() -> None:
    assert from_properties(properties()) is H100
    assert from_properties(properties(name="NVIDIA H200")) is H200
    assert from_properties(properties(name="NVIDIA A100-SXM4-80GB", multi_processor_count=108)) is A100
    amd = properties(
        name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304
    )
    assert from_properties(amd) is MI300X


def test_a_product_with_fewer_processors_is_another() -> None:
    board = from_properties(
        properties(
            name="NVIDIA H100 PCIe",
            multi_processor_count=114,
            memory_clock_rate=1_593_000,
            clock_rate=1_755_000,
        )
    )
    assert (board.name, board.processors, board.target) == ("NVIDIA H100 PCIe", 114, "sm_90")
    # Its data sheet says 2.0 TB/s and 756 TFLOP/s.
    assert 0.8 * 2.0e12 < board.memory_rate < 2.1e12
    assert 0.6 * 756e12 < board.matmul_rate < 756e12


def test_a_board_of_a_known_architecture_is_estimated() -> None:
    amd = properties(
        name="AMD Instinct MI300A",
        gcnArchName="gfx942:sramecc+:xnack-",
        multi_processor_count=228,
        shared_memory_per_multiprocessor=65536,
        shared_memory_per_block_optin=65536,
    )
    gpu = from_properties(amd)
    assert (gpu.target, gpu.architecture.warp, gpu.architecture.descriptors) == ("gfx942", 64, False)


def test_torch_may_be_too_old_to_tell_clocks() -> None:
    sparse = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58)
    gpu = from_properties(sparse)
    assert (gpu.target, gpu.processors) == ("sm_89", 58)
    assert min(gpu.memory_rate, gpu.matmul_rate, gpu.l2_rate, gpu.l2) > 0


def test_an_architecture_not_listed_is_like_the_one_before() -> None:
    newer = architecture("sm_103")
    assert (newer.target, newer.shared) == ("sm_103", ARCHITECTURES["sm_100"].shared)
    for nothing in ("sm_52", "sm_", "gfx803", "tpu", ""):
        with pytest.raises(ValueError, match="no known GPU target"):
            architecture(nothing)


def test_every_target_has_a_gpu_to_plan_for() -> None:
    assert for_target("sm_90") is H200
    assert for_target("sm_80") is A100
    for target in ARCHITECTURES:
        assert for_target(target).target == target
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


@pytest.mark.parametrize(
    ("registers", "shared_kb", "warps", "blocks"),
    [(64, 60, 4, 3), (122, 72, 4, 3), (116, 96, 8, 2), (210, 192, 8, 1), (32, 0, 4, 16), (256, 0, 4, 0)],
)
def test_resident_blocks_are_those_of_the_profiler(
    registers: int, shared_kb: int, warps: int, blocks: int
) -> None:
    """The first four: vLLM's kernels on sm_90, as CUDA's occupancy calculator has them."""
    assert architecture("sm_90").resident_blocks(registers, shared_kb * 1024, warps) == blocks


def test_a_block_of_all_of_the_shared_memory_fits_alone_and_not_more() -> None:
    for facts in ARCHITECTURES.values():
        assert facts.resident_blocks(32, facts.block_shared, 4) == 1
        assert facts.resident_blocks(32, facts.block_shared + 1, 4) == 0
