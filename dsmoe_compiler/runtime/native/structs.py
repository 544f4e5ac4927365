"""The native library's structures (codegen/native/abi.h), and a bound layer's FFNs as them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.codegen.ffn import Ffn, Unsupported
from dsmoe_compiler.codegen.native.instructions import lines
from dsmoe_compiler.codegen.term import Product, Step, Term, Vector

# What is left of a last term that only weighs: weights are applied where a token's rows are added up.
_PRODUCT = Term(steps=[Step("product", (), (0,))], result=0)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MAX_LINES = 64  # of a term (term_limits.h)


class CMatrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("per_expert", ctypes.c_int64),
        ("per_output", ctypes.c_int64),
        ("per_input", ctypes.c_int64),
    ]


class CVector(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("per_expert", ctypes.c_int64),
        ("per_column", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class CInstruction(ctypes.Structure):
    _fields_ = [
        ("op", ctypes.c_int32),
        ("args", ctypes.c_int32 * 3),
        ("constants", ctypes.c_float * 3),
    ]


class CTerm(ctypes.Structure):
    _fields_ = [
        ("lines", ctypes.POINTER(CInstruction)),
        ("count", ctypes.c_int32),
        ("weighs", ctypes.c_int32),
    ]


class CFfn(ctypes.Structure):
    _fields_ = [
        ("experts", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("products", ctypes.c_int32),
        ("weighted", ctypes.c_int32),
        ("first", CMatrix * 2),
        ("down", CMatrix),
        ("factor", CTerm),
        ("middle", CTerm),
        ("last", CTerm),
        ("vectors", ctypes.POINTER(CVector)),
    ]


class CCall(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("per_token", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
        ("weights_dtype", ctypes.c_int32),
        ("gates_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    ]


def c_ffn(ffn: Ffn, experts: int, params: Sequence[Tensor]) -> CFfn:
    """The FFN over these tensors (E first, on the CPU), which must outlive it and stay where they are.

    Raises Unsupported for a dtype, an operator or a term that the kernels do not have.
    """
    matrices = [params[p.param] for p in (*ffn.products, ffn.down)]
    dtypes = {m.dtype for m in matrices}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        raise Unsupported(f"its matrices are {' and '.join(sorted(map(_name, dtypes)))}")
    vectors = [*ffn.middle.vectors, *ffn.last.vectors]
    made = CFfn(
        experts=experts,
        hidden=ffn.hidden,
        width=ffn.width,
        out=matrices[-1].shape[2 if ffn.down.transposed else 1],
        dtype=DTYPES[matrices[0].dtype],
        products=len(ffn.products),
        weighted=ffn.is_weighted,
        first=(CMatrix * 2)(*[_matrix(p, m) for p, m in zip(ffn.products, matrices, strict=False)]),
        down=_matrix(ffn.down, matrices[-1]),
        factor=_term(ffn.factor, 0),
        middle=_term(ffn.middle, 0),
        last=_term(_PRODUCT if ffn.is_weighted else ffn.last, len(ffn.middle.vectors)),
        vectors=(CVector * max(1, len(vectors)))(*[_vector(v, params[v.param]) for v in vectors]),
    )
    return made


def _matrix(product: Product, tensor: Tensor) -> CMatrix:
    output, inner = (2, 1) if product.transposed else (1, 2)
    begin = product.first * tensor.stride(output) * tensor.element_size()
    steps = (tensor.stride(0), tensor.stride(output) * product.step, tensor.stride(inner))
    return CMatrix(tensor.data_ptr() + begin, *steps)


def _vector(vector: Vector, tensor: Tensor) -> CVector:
    if tensor.dtype not in DTYPES:
        raise Unsupported(f"it reads vectors in {_name(tensor.dtype)}")
    if tensor[0].numel() != tensor.shape[-1] and tensor.dim() > 1:
        raise Unsupported("it reads a matrix where the kernels take a vector")
    step = tensor.stride(-1) if tensor.dim() > 1 else 0
    begin = vector.first * step * tensor.element_size()
    along = 0 if vector.single else step * vector.step
    return CVector(tensor.data_ptr() + begin, tensor.stride(0), along, DTYPES[tensor.dtype])


def _term(term: Term | None, vectors: int) -> Any:
    """A term whose vectors' numbers begin at `vectors`."""
    if term is None:
        return CTerm(None, 0, 0)
    made = lines(term)
    if len(made) > MAX_LINES:
        raise Unsupported(f"a term of it has {len(made)} lines, the kernels take {MAX_LINES}")
    vector = 1  # the number of that leaf
    rows = [
        CInstruction(
            line.op,
            (ctypes.c_int32 * 3)(*[a + vectors if line.op == vector else a for a in line.args]),
            (ctypes.c_float * 3)(*line.constants),
        )
        for line in made
    ]
    return CTerm((CInstruction * len(rows))(*rows), len(rows), term.weighs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
