"""Interpreting a kernel leaves Triton, and the same kernel compiled, as they were."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsmoe_compiler.codegen.kernels import permute
from tests.codegen.interpreted import interpreted, interpreter


def _counted(ids: torch.Tensor) -> list[int]:
    counts = torch.empty(1, 4, dtype=torch.int32)
    with interpreter():
        interpreted("permute").count[(1,)](ids, counts, ids.numel(), E=4, E_PAD=4, CHUNK=16)
    return list(counts[0].tolist())


def test_a_process_interprets_and_compiles_in_turn() -> None:
    assert _counted(torch.tensor([3, 1, 3, -1])) == [0, 1, 0, 2]
    signature = dict.fromkeys(("ids", "counts"), "*i32") | {"P": "i32"}
    constants = {"E": 512, "E_PAD": 512, "CHUNK": 256}
    source = ASTSource(
        fn=permute.count,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True})
        assert "tt.histogram" in compiled.asm["ttir"]
    assert _counted(torch.tensor([0, 0, 4])) == [2, 0, 0, 0]


def test_everything_is_put_back() -> None:
    owners = (tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype)
    before = [dict(vars(owner)) for owner in owners]
    _counted(torch.tensor([1]))
    assert [dict(vars(owner)) for owner in owners] == before
    assert not triton.knobs.runtime.interpret
    assert isinstance(permute.count, triton.runtime.JITFunction)


def test_a_kernel_that_another_imports_is_imported_once() -> None:
    assert interpreted("route").last_to_arrive is interpreted("arrive").last_to_arrive
