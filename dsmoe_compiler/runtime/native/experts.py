"""A fused layer by the native kernels: its FFNs bound to the tensors they read, and the call.

Shapes: x_TD, ids_TK, weights_TK.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_compiler.codegen.ffn import Unsupported, as_ffn
from dsmoe_compiler.codegen.gate import split_gate
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.body import Body
from dsmoe_compiler.ir.spec import ExpertsSpec, SharedSpec
from dsmoe_compiler.runtime.layers import operand
from dsmoe_compiler.runtime.native.library import LEVELS, Library
from dsmoe_compiler.runtime.native.structs import DTYPES, CCall, CFfn, c_ffn


@dataclass(frozen=True)
class Layer:
    """Routed experts, and shared ones where there are any, ready to be called. `gate` weighs the shared
    experts, if it is given, by their tensors `shared`; the structures point at `params` and `shared`.
    """

    library: Library
    level: int
    routed: CFfn
    always: CFfn | None
    gate: Body | None
    out_dtype: torch.dtype
    params: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """out (T, out width). Raises IndexError on an id that is no expert's, ValueError on other shapes."""
        tokens, slots = ids_TK.shape
        if x_TD.shape != (tokens, self.routed.hidden) or weights_TK.shape != ids_TK.shape:
            told = ", ".join(str(tuple(t.shape)) for t in (x_TD, ids_TK, weights_TK))
            raise ValueError(f"x, ids, weights are {told}, not (T, {self.routed.hidden}), (T, K), (T, K)")
        if x_TD.stride(1) != 1:
            x_TD = x_TD.contiguous()
        if ids_TK.dtype is not torch.int64 or not ids_TK.is_contiguous():
            ids_TK = ids_TK.to(torch.int64).contiguous()
        if not weights_TK.is_contiguous():
            weights_TK = weights_TK.contiguous()
        gates_T = None
        if self.gate:
            gates_T = reference.evaluate(self.gate, x_TD, None, self.shared).contiguous()
        out = x_TD.new_empty(tokens, self.routed.out, dtype=self.out_dtype)
        call = CCall(
            x_TD.data_ptr(),
            x_TD.stride(0),
            tokens,
            slots,
            ids_TK.data_ptr(),
            weights_TK.data_ptr(),
            None if gates_T is None else gates_T.data_ptr(),
            DTYPES[weights_TK.dtype],
            0 if gates_T is None else DTYPES[gates_T.dtype],
            DTYPES[self.out_dtype],
            out.data_ptr(),
            torch.get_num_threads(),
            self.level,
        )
        always = None if self.always is None else ctypes.byref(self.always)
        status = self.library.handle.dsmoe_run(ctypes.byref(self.routed), always, ctypes.byref(call))
        if status == _BAD_EXPERT:
            raise IndexError(f"an expert id is not in [0, {self.routed.experts}), nor −1 for none")
        if status == _NO_MEMORY:
            raise MemoryError(f"no memory for {tokens} tokens of a layer's experts")
        assert status == 0, status
        return out


_BAD_EXPERT, _NO_MEMORY = 1, 2


def bind(
    library: Library,
    spec: ExpertsSpec,
    x: Tensor,
    weights: Tensor,
    params: Sequence[Tensor],
    shared_spec: SharedSpec | None = None,
    shared: Sequence[Tensor] = (),
) -> Layer:
    """The layer on these tensors, for x and weights that are like those given.

    Raises Unsupported where the kernels cannot run it.
    """
    out = reference.out_dtype(spec, reference.row_shape(spec, x, weights, params)[1])
    routed = _ffn(spec.body, spec.hidden, spec.count, x, params)
    always, gate = None, None
    if shared_spec is not None:
        stacked = [p.unsqueeze(0) for p in shared]
        body, gate = split_gate(shared_spec.body, spec.hidden, [operand(p) for p in stacked])
        always = _ffn(body, spec.hidden, 1, x, stacked)
        if always.out != routed.out:
            raise Unsupported("their outputs are of another width")
        out = torch.promote_types(out, _row_dtype(shared_spec.body, spec.hidden, x, shared))
        if gate and _row_dtype(gate, spec.hidden, x, shared) not in DTYPES:
            raise Unsupported("their gate is of another dtype")
    if out not in DTYPES or weights.dtype not in DTYPES:
        raise Unsupported(f"its outputs are {out}, its routing weights {weights.dtype}")
    return Layer(
        library, LEVELS.index(library.level) + 1, routed, always, gate, out, tuple(params), tuple(shared)
    )


def choose(
    library: Library,
    spec: ExpertsSpec,
    x: Tensor,
    weights: Tensor,
    params: Sequence[Tensor],
    shared_spec: SharedSpec | None = None,
    shared: Sequence[Tensor] = (),
) -> Layer:
    """As `bind`, where that is faster than torch's operators. Raises Unsupported where it is not, too."""
    layer = bind(library, spec, x, weights, params, shared_spec, shared)
    for ffn in (layer.routed, layer.always):
        if ffn is not None and ffn.dtype == DTYPES[torch.float32] and _apart(ffn):
            raise Unsupported("torch's products are faster on float32 matrices (in, out)")
    return layer


def _apart(ffn: CFfn) -> bool:
    """Whether a matrix has its inputs apart, so that its rows must be brought together first."""
    matrices = (*ffn.first[: ffn.products], ffn.down)
    return any(matrix.per_input != 1 for matrix in matrices)


def _ffn(body: Body, hidden: int, experts: int, x: Tensor, params: Sequence[Tensor]) -> CFfn:
    if counts := {len(p) for p in params} - {experts}:
        raise Unsupported(f"it has tensors of {counts.pop()} experts, not {experts}")
    made = c_ffn(as_ffn(body, hidden, [operand(p) for p in params]), experts, params)
    if made.dtype != DTYPES.get(x.dtype):
        raise Unsupported(f"its tokens are {x.dtype}, its matrices are not")
    return made


def _row_dtype(body: Body, hidden: int, x: Tensor, params: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the body's rows."""
    row = torch.empty(1, hidden, dtype=x.dtype, device="meta")
    return reference.evaluate(body, row, None, [p.to("meta") for p in params]).dtype
