"""linalg by IREE's compiler, where that is installed (pip install iree-base-compiler iree-base-runtime)."""

import numpy as np
import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler.export.mlir.write import export_mlir
from dsmoe_compiler.models.zoo import build
from tests.tiny_models import relative, tokens

pytest.importorskip("torch_mlir")
compiler = pytest.importorskip("iree.compiler")
runtime = pytest.importorskip("iree.runtime")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-moe-tiny", "deepseek-v3-tiny"])
def test_iree_computes_the_same(name: str) -> None:
    model = build(name)
    program = dsmoe.compile(model, (tokens(2, 8),), verify="off", require_fused=True)
    text = export_mlir(program.exported, dialect="linalg", weights=True)
    binary = compiler.compile_str(
        text, target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"]
    )
    context = runtime.SystemContext(config=runtime.Config("local-sync"))
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, binary))
    for shape in ((2, 12), (3, 9), (1, 1)):
        ids = tokens(*shape, seed=1)
        result = torch.from_numpy(np.array(context.modules.module.main(ids.numpy())))
        assert relative(result, model(ids)) < 5e-6, shape
