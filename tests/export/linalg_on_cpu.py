"""Runs linalg on tensors on a CPU: torch-mlir's reference backend, whose passes its package has.

Its Python driver is not in the package. Nothing here is fast: loops, and no vectors.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_mlir.dialects.torch import register_dialect
from torch_mlir.execution_engine import ExecutionEngine
from torch_mlir.ir import Context, Module
from torch_mlir.passmanager import PassManager
from torch_mlir.runtime import (
    UnrankedMemRefDescriptor,
    get_unranked_memref_descriptor,
    unranked_memref_to_numpy,
)

_PASSES = (
    "func.func(refback-generalize-tensor-concat)",
    "one-shot-bufferize{copy-before-write bufferize-function-boundaries "
    "function-boundary-type-conversion=identity-layout-map}",
    "buffer-deallocation-pipeline",
    "refback-munge-calling-conventions",
    "func.func(refback-munge-memref-copy,convert-linalg-to-loops,lower-affine)",
    "convert-scf-to-cf",
    "func.func(refback-expand-ops-for-llvm,arith-expand,convert-math-to-llvm)",
    "convert-math-to-libm",
    "expand-strided-metadata",
    "lower-affine",
    "convert-bufferization-to-memref",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "reconcile-unrealized-casts",
)
_RESULT = "refbackend_consume_func_return_mrf32"  # called with the one result, float32


class LinalgOnCpu:
    """A text's function `main` of tensors, with one result in float32."""

    def __init__(self, text: str) -> None:
        context = Context()
        register_dialect(context)
        with context:
            module = Module.parse(text)
            PassManager.parse(f"builtin.module({','.join(_PASSES)})").run(module.operation)
            self._engine = ExecutionEngine(module, opt_level=1)
        self._take = ctypes.CFUNCTYPE(None, ctypes.POINTER(UnrankedMemRefDescriptor))(self._taken)
        self._engine.register_runtime(_RESULT, self._take)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What `main` makes of the inputs."""
        given = [ctypes.pointer(get_unranked_memref_descriptor(x.contiguous().numpy())) for x in inputs]
        self._engine.invoke("main", *map(ctypes.pointer, given))
        return self._result

    def _taken(self, result: Any) -> None:
        self._result = torch.from_numpy(np.array(unranked_memref_to_numpy(result, np.float32)))
