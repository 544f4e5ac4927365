"""A fused layer on a CPU: by the native kernels, or by torch's operators where there are none or they do not
know the layer. The router is torch's.

Shapes: x_TD, ids_TK, weights_TK.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, is_grad_enabled, nn

from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, parse
from dsmoe_compiler.runtime.native.bound import Bound
from dsmoe_compiler.runtime.native.library import Library, native
from dsmoe_compiler.runtime.torch_experts import run_experts


class CpuExperts(nn.Module):
    """`dsmoe::experts` for one spec, parsed once."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.text, self.spec = spec, parse(spec, ExpertsSpec)
        library = native()
        self.bound = Bound(library, self.spec) if isinstance(library, Library) else None

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, params: Sequence[Tensor]) -> Tensor:
        """out (T, D); differentiable through the reference where a gradient is wanted."""
        if _wants_gradient(x_TD, weights_TK, *params):
            return ops.EXPERTS(x_TD, ids_TK, weights_TK, params, self.text)  # type: ignore[no-any-return]
        out_TD = self.bound(x_TD, ids_TK, weights_TK, params) if self.bound else None
        return run_experts(x_TD, ids_TK, weights_TK, params, self.spec) if out_TD is None else out_TD

    def prepare(self, x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor]) -> None:
        """Do now what the first call with such tokens, on the meta device here, would do."""
        if self.bound:
            self.bound.prepare(x, weights, params)

    def extra_repr(self) -> str:
        return str(self.spec)


class CpuMoE(nn.Module):
    """`dsmoe::moe` for one spec, parsed once."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.text, self.spec = spec, parse(spec, MoESpec)
        library = native()
        self.whole = self.routed = None
        if isinstance(library, Library):
            self.whole = Bound(library, self.spec.experts, self.spec.shared)
            # For shared experts that the kernels do not know.
            self.routed = Bound(library, self.spec.experts) if self.spec.shared else None

    def forward(
        self, x_TD: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Tensor:
        """out (T, D); differentiable through the reference where a gradient is wanted."""
        if _wants_gradient(x_TD, *router, *params, *shared):
            return ops.MOE(x_TD, router, params, shared, self.text)  # type: ignore[no-any-return]
        weights_TK, ids_TK = reference.route_tokens(x_TD, router, self.spec)
        out_TD = self.whole(x_TD, ids_TK, weights_TK, params, shared) if self.whole else None
        if out_TD is not None:
            return out_TD
        out_TD = self.routed(x_TD, ids_TK, weights_TK, params) if self.routed else None
        if out_TD is None:
            out_TD = run_experts(x_TD, ids_TK, weights_TK, params, self.spec.experts)
        if self.spec.shared is None:
            return out_TD
        # One token as a vector: a matrix-vector product reads the weights faster.
        rows = x_TD[0] if x_TD.shape[0] == 1 else x_TD
        return out_TD + reference.shared_experts(rows, shared, self.spec.shared)

    def prepare(
        self, x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> None:
        """Do now what the first call with such tokens, on the meta device here, would do."""
        weights, _ = reference.route_tokens(x, [p.to("meta") for p in router], self.spec)
        if self.whole:
            self.whole.prepare(x, weights, params, shared)
        if self.routed:
            self.routed.prepare(x, weights, params)

    def extra_repr(self) -> str:
        return str(self.spec)


class CpuRoute(nn.Module):
    """`dsmoe::route` for one spec, parsed once."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = parse(spec, RouterSpec)

    def forward(self, logits_TE: Tensor, selection_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """weights and ids (T, K)."""
        return reference.route(logits_TE, selection_bias, self.spec)


def _wants_gradient(*tensors: Tensor) -> bool:
    return is_grad_enabled() and any(t.requires_grad for t in tensors)
