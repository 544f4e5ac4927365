"""A layer as code generation sees it: what it is, and how its tensors lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dsmoe_compiler.codegen.ffn import Ffn, Unsupported, as_ffn
from dsmoe_compiler.codegen.operand import SIZES, Operand
from dsmoe_compiler.codegen.route_flags import route_constants
from dsmoe_compiler.codegen.tiles import Problem
from dsmoe_compiler.ir.spec import ExpertsSpec, RouterSpec, SharedSpec

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Layer:
    """All that code generation knows of a layer: what it is, and how its tensors lie.

    `x` and `weights` are dtypes (`weights` of the routing weights, where they are given), `row` that of what
    an expert makes of a token, `out` the result's. Shared experts' operands have one expert in front, of
    stride 0.
    """

    top_k: int
    experts: ExpertsSpec
    params: tuple[Operand, ...]
    x: str
    weights: str
    row: str
    out: str
    router: RouterSpec | None = None
    router_params: tuple[Operand, ...] = ()
    shared: SharedSpec | None = None
    shared_params: tuple[Operand, ...] = ()

    @cached_property
    def ffn(self) -> Ffn:
        """The experts' body in the kernels' form. Raises Unsupported."""
        for dtype in (self.x, self.row):
            if dtype not in DTYPES:
                raise Unsupported(f"a token's row is {dtype}; kernels compute {', '.join(DTYPES)}")
        return _checked(self.experts, self.params)

    @cached_property
    def shared_ffn(self) -> Ffn | None:
        """The shared experts' body, where there are shared experts and the kernels can run them."""
        if self.shared is None:
            return None
        try:
            ffn = as_ffn(self.shared.body, self.experts.hidden, self.shared_params)
            _require_readable(self.shared_params)
            return ffn
        except Unsupported:
            return None

    @property
    def added(self) -> bool:
        """Whether the shared experts' output is computed elsewhere and given."""
        return self.shared is not None and self.shared_ffn is None

    def problem(self, tokens: int) -> Problem:
        """What the plan depends on, for a bucket of tokens."""
        ffn, shared, first = self.ffn, self.shared_ffn, self.ffn.products[0]
        bodies = [(ffn, self.params)] + ([(shared, self.shared_params)] if shared else [])
        used = [params[p.param] for body, params in bodies for p in (*body.products, body.down)]
        # The widest: tiles of it fit into shared memory whichever operand they are of.
        dtype = max(self.x, *(o.dtype for o in used), key=SIZES.__getitem__)
        hidden_bytes = [body.width * SIZES[params[body.down.param].dtype] for body, params in bodies]
        return Problem(
            tokens=tokens,
            hidden=ffn.hidden,
            width=ffn.width,
            experts=self.experts.count,
            top_k=self.top_k,
            taps=len(ffn.products),
            dtype=dtype,
            shared_width=shared.width if shared else 0,
            tma=all(o.allows_descriptor for o in used) and not any(n % 16 for n in hidden_bytes),
            interleaved=first.step == 2,
            up_transposed=first.transposed,
            down_transposed=ffn.down.transposed,
            biased=any(len(o.shape) < 3 for o in self.params),
        )

    @cached_property
    def route_constants(self) -> dict[str, object]:
        """What the routing kernel knows of the router. Raises Unsupported."""
        assert self.router is not None
        weight, *rest = self.router_params
        try:
            return route_constants(
                self.router,
                experts=self.experts.count,
                hidden=self.experts.hidden,
                x=self.x,
                weight=weight.dtype,
                selection_bias=rest[-1].dtype if self.router.selection_bias else "",
            )
        except ValueError as e:
            raise Unsupported(str(e)) from e

    @property
    def can_route(self) -> bool:
        """Whether there is a router that the routing kernel computes."""
        try:
            return self.router is not None and bool(self.route_constants)
        except Unsupported:
            return False


def _checked(spec: ExpertsSpec, params: tuple[Operand, ...]) -> Ffn:
    ffn = as_ffn(spec.body, spec.hidden, params)
    _require_readable(params)
    return ffn


def _require_readable(params: tuple[Operand, ...]) -> None:
    """Raises Unsupported unless kernels can read the tensors."""
    for operand in params:
        if operand.dtype not in DTYPES:
            raise Unsupported(f"a tensor of the experts is {operand.dtype}; kernels read {', '.join(DTYPES)}")
        if len(operand.shape) > 1 and not operand.is_dense:
            raise Unsupported("the rows of an expert's tensor are not contiguous")
        if len(operand.shape) == 3 and operand.shape[1] * operand.rows >= 2**31:
            raise Unsupported("an expert's matrix spans 2³¹ numbers or more, and kernels count them in int32")
