"""Kernels are compiled for named targets without a GPU, as a launch would specialise them, and read right."""

import warnings
from functools import cache
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dsmoe_compiler.codegen.architecture import architecture
from dsmoe_compiler.codegen.resources import Compiled, Resources, compile_launch, resources, signature


@triton.jit  # type: ignore[untyped-decorator]
def products(  # type: ignore[no-untyped-def]
    x,
    weight,
    y,
    first,
    stride,
    rows,
    scale,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr = 64,
):
    """y[r] = scale · x[r] · weight[first]ᵀ, a block of ROWS by 64."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 64)
    sums = tl.zeros((ROWS, 64), tl.float32)
    for k in range(0, stride, DEPTH):
        a = tl.load(x + row * stride + k + tl.arange(0, DEPTH)[None, :], mask=row < rows, other=0.0)
        if TMA:
            b = weight.load([first, 0, k]).reshape(64, DEPTH)
        else:
            b = tl.load(weight + column[:, None] * stride + k + tl.arange(0, DEPTH)[None, :])
        sums = tl.dot(a, b.T, sums)
    tl.store(y + row * 64 + column[None, :], sums * scale, mask=row < rows)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(tma: bool, **given: Any) -> dict[str, Any]:
    weight = meta(8, 64, 2048)
    return {
        "x": meta(64, 2048),
        "weight": TensorDescriptor.from_tensor(weight, [1, 64, 64]) if tma else weight,
        "y": meta(64, 64, dtype=torch.float32),
        "first": 1,
        "stride": 2048,
        "rows": 33,
        "scale": 0.5,
        "ROWS": 64,
        "TMA": tma,
        **given,
    }


@cache
def compiled(target: str, **options: Any) -> Compiled:
    return compile_launch(
        products, arguments(target == "sm_90"), {"num_warps": 4, "num_stages": 3, **options}, target
    )


def test_a_launch_is_specialised_as_triton_would() -> None:
    signed = signature(products, arguments(tma=True), "sm_90")
    assert signed.types == {
        "x": "*bf16",
        "weight": "tensordesc<bf16[1, 64, 64]>",
        "y": "*fp32",
        "first": "constexpr",
        "stride": "i32",
        "rows": "i32",
        "scale": "fp32",
        "ROWS": "constexpr",
        "TMA": "constexpr",
        "DEPTH": "constexpr",
    }
    # By position: first = 1, the flags and the default.
    assert signed.constants == {(3,): 1, (7,): 64, (8,): True, (9,): 64}
    aligned = {at for (at,), marks in signed.attributes.items() if ["tt.divisibility", 16] in marks}
    assert aligned == {0, 2, 4}  # x, y and stride = 2048; not rows = 33


def test_a_number_beyond_32_bits_is_a_long_one() -> None:
    assert signature(products, arguments(tma=False, stride=1 << 40), "sm_80").types["stride"] == "i64"


def test_hopper_shows_its_instructions() -> None:
    found = resources(compiled("sm_90"))
    assert found.wgmma and found.tma_loads and found.cp_async
    assert (found.mma, found.spill_stores, found.spill_loads, found.threads) == (0, 0, 0, 128)
    # Three stages of two tiles of 64 × 64, and the barriers.
    assert 3 * 2 * 64 * 64 * 2 <= found.shared < 3 * 2 * 64 * 64 * 2 + 1024


def test_ampere_shows_its_own() -> None:
    found = resources(compiled("sm_80"))
    assert found.mma and found.cp_async
    assert (found.wgmma, found.tma_loads, found.spill_stores, found.threads) == (0, 0, 0, 128)


def test_amds_are_counted_in_their_own_words() -> None:
    found = resources(compiled("gfx942"))
    assert found.mma and found.scalar_registers
    assert (found.wgmma, found.tma_loads, found.spill_stores, found.threads) == (0, 0, 0, 256)
    assert 0 < found.shared <= 65536


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_blocks_on_a_processor_follow_from_registers_and_shared_memory(target: str) -> None:
    found, facts = resources(compiled(target)), architecture(target)
    warps = found.threads // facts.warp
    assert found.resident == facts.resident_blocks(found.registers, found.shared, warps) > 0
    assert found.resident * found.registers * found.threads <= facts.registers
    assert found.resident * found.shared <= facts.shared


def test_registers_that_do_not_suffice_are_seen_to_spill() -> None:
    free, squeezed = resources(compiled("sm_80")), resources(compiled("sm_80", maxnreg=64))
    assert squeezed.registers == 64 < free.registers
    assert squeezed.spill_stores > 0 and squeezed.spill_loads > 0
    assert squeezed.mma == free.mma

    amd = resources(compiled("gfx942", waves_per_eu=8))
    assert amd.registers <= 64
    assert amd.spill_stores > 0 and amd.spill_loads > 0


def test_every_stage_can_be_printed() -> None:
    nvidia, amd = compiled("sm_90"), compiled("gfx942")
    assert nvidia.stages == ("ttir", "ttgir", "llir", "ptx", "sass")
    assert amd.stages == ("ttir", "ttgir", "llir", "amdgcn")
    for each, words in (
        (nvidia, ("tt.func", "ttg.num-warps", "define", ".target sm_90a", "HGMMA")),
        (amd, ("tt.func", "ttg.num-warps", "define", "v_mfma")),
    ):
        for stage, word in zip(each.stages, words, strict=True):
            assert word in each.text(stage), stage
    with pytest.raises(ValueError, match="gfx942 has no 'ptx'; it has ttir, ttgir, llir, amdgcn"):
        amd.text("ptx")


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="'sm_12' is no known GPU target"):
        compile_launch(products, arguments(tma=False), {}, "sm_12")


def test_nothing_is_left_to_a_default_that_changes() -> None:
    """Triton 3.9 warns where it is not told whether to fuse multiply-adds."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = compile_launch(products, arguments(tma=False, rows=35), {"num_warps": 4}, "sm_80")
    assert fused.kernel.metadata.enable_fp_fusion is True
    assert isinstance(resources(fused), Resources)
