"""The ops: registered as torch wants them; reference, decomposition and CPU runtime compute one function.

Tolerances: in float64 a sum of n ≤ 16 products is off by n·2⁻⁵³ = 2e-15, twice, and summed over K: 1e-13.
In float32 the same arithmetic with 2⁻²⁴ gives 1e-6 of the largest number: 1e-5. In bfloat16 each of at most 8
roundings may fall on either side: 8·2⁻⁸ = 3e-2.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.ir import decompose, ops, reference
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec, to_text
from dsmoe_compiler.runtime.cpu import CpuExperts, CpuMoE, CpuRoute

D, F, E = 6, 4, 5
SWIGLU = parse_body(f"h=linear(x,p0); mul(linear(mul(silu(slice(h,0,{F},1)),slice(h,{F},{2 * F},1)),p1),w)")
BIASED = parse_body("mul(add(matmul(gelu(add(matmul(x,p0),p1)),p2),p3),w)")
INSIDE = parse_body("linear(relu(linear(mul(x,w),p0)),p1)")
UNWEIGHTED = parse_body("linear(relu(linear(x,p0)),p1)")
PARAMS = {
    SWIGLU: ((E, 2 * F, D), (E, D, F)),
    BIASED: ((E, D, F), (E, F), (E, F, D), (E, D)),
    INSIDE: ((E, F, D), (E, D, F)),
    UNWEIGHTED: ((E, F, D), (E, D, F)),
}
NAMES = {SWIGLU: "swiglu", BIASED: "biased", INSIDE: "inside", UNWEIGHTED: "unweighted"}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}
ROUTERS = (
    RouterSpec(2, "softmax"),
    RouterSpec(2, "softmax", "logits", logits_bias=True),
    RouterSpec(2, "sigmoid", renormalize=True, epsilon=1e-20, scale=2.5, selection_bias=True),
    RouterSpec(E, "softmax", renormalize=True, score_dtype="float32"),
)
SHARED = SharedSpec(parse_body("linear(silu(linear(x,p0)),p1)"), F)


def params(body: object, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) * 0.5 for shape in PARAMS[body]]  # type: ignore[index]


def routing(tokens: int, k: int, dtype: torch.dtype, *, drops: bool) -> tuple[Tensor, Tensor]:
    """(ids, weights); with `drops` about a third of the ids is −1, and the first token's all are."""
    ids = torch.rand(tokens, E).argsort(-1)[:, :k]
    if drops:
        ids = ids.masked_fill(torch.rand(tokens, k) < 0.3, -1)
        ids[:1] = -1
    return ids, torch.rand(tokens, k, dtype=dtype)


def by_hand(x: Tensor, ids: Tensor, weights: Tensor, tensors: Sequence[Tensor], spec: ExpertsSpec) -> Tensor:
    """out[t] = Σ_k body(x[t], w[t,k], P[ids[t,k]]), pair by pair, in float64."""
    out = torch.zeros(x.shape[0], D, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(ids.shape[1]):
            if (e := int(ids[t, k])) >= 0:
                own = [p[e].double() for p in tensors]
                row = reference.evaluate(
                    spec.body, x[t : t + 1].double(), weights[t, k].view(1, 1).double(), own
                )
                out[t] += row[0]
    return out


@pytest.mark.parametrize("body", PARAMS, ids=NAMES.get)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "drops"), [(0, 2, False), (1, 3, False), (7, E, False), (13, 2, True), (1, 2, True)]
)
def test_experts_by_hand(body: object, dtype: torch.dtype, tokens: int, k: int, drops: bool) -> None:
    spec = ExpertsSpec(E, D, body)  # type: ignore[arg-type]
    ids, weights = routing(tokens, k, dtype, drops=drops)
    x, tensors = torch.randn(tokens, D, dtype=dtype), params(body, dtype)
    expected = by_hand(x, ids, weights, tensors, spec)
    call = (x, ids, weights, tensors)
    found = {
        "reference": ops.EXPERTS(*call, to_text(spec)),
        "decomposition": decompose.experts(*call, to_text(spec)),
        "cpu": CpuExperts(to_text(spec))(*call),
    }
    scale = expected.abs().max().item() if tokens else 1.0
    for name, out in found.items():
        assert (out.dtype, out.shape) == (dtype, (tokens, D)), name
        error = (out.double() - expected).abs().max().item() if tokens else 0.0
        assert error <= TOLERANCE[dtype] * max(scale, 1.0), name


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("shared", [None, SHARED], ids=["routed", "shared"])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_moe_is_route_then_experts_then_shared(
    router: RouterSpec, shared: SharedSpec | None, tokens: int
) -> None:
    spec = MoESpec(router.top_k, ExpertsSpec(E, D, SWIGLU), router, shared)
    x, tensors = torch.randn(tokens, D, dtype=torch.float64), params(SWIGLU, torch.float64)
    gate = [torch.randn(E, D, dtype=torch.float64)]
    gate += [torch.randn(E, dtype=torch.float64)] * (router.logits_bias + router.selection_bias)
    beside = (
        [torch.randn(F, D, dtype=torch.float64), torch.randn(D, F, dtype=torch.float64)] if shared else []
    )
    logits = reference.router_logits(x, gate, router)
    weights, ids = ops.ROUTE(logits, gate[-1] if router.selection_bias else None, to_text(router))
    expected = by_hand(x, ids, weights, tensors, spec.experts)
    if shared:
        expected = expected + reference.evaluate(shared.body, x, None, beside)
    call = (x, gate, tensors, beside)
    tolerance = 1e-6 if router.score_dtype else 1e-13  # float32 scores
    for out in (ops.MOE(*call, spec.text), decompose.moe(*call, spec.text), CpuMoE(spec.text)(*call)):
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_the_cpu_routes_as_the_reference(router: RouterSpec) -> None:
    logits, bias = torch.randn(9, E), torch.randn(E) if router.selection_bias else None
    for ours, theirs in zip(
        CpuRoute(to_text(router))(logits, bias), ops.ROUTE(logits, bias, to_text(router)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("body", PARAMS, ids=NAMES.get)
def test_gradients_are_those_of_the_decomposition(body: object) -> None:
    """In float64: the op's own formula against autograd through plain ATen."""
    text = to_text(ExpertsSpec(E, D, body))  # type: ignore[arg-type]
    ids, weights = routing(7, 3, torch.float64, drops=True)
    leaves = [torch.randn(7, D, dtype=torch.float64), weights, *params(body, torch.float64)]
    cotangent = torch.randn(7, D, dtype=torch.float64)

    def gradients(op: object) -> list[Tensor | None]:
        x, w, *tensors = (leaf.clone().requires_grad_() for leaf in leaves)
        (op(x, ids, w, tensors, text) * cotangent).sum().backward()  # type: ignore[operator]
        return [t.grad for t in (x, w, *tensors)]

    for ours, theirs in zip(gradients(ops.EXPERTS), gradients(decompose.experts), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("body", PARAMS, ids=NAMES.get)
def test_torch_accepts_experts(body: object, check: str) -> None:
    text = to_text(ExpertsSpec(E, D, body, out_dtype="float32"))  # type: ignore[arg-type]
    ids, weights = routing(5, 2, torch.float32, drops=True)
    tensors = [p.requires_grad_() for p in params(body, torch.float32)]
    call = (torch.randn(5, D, requires_grad=True), ids, weights, tensors, text)
    torch.library.opcheck(ops.EXPERTS, call, test_utils=check)


@pytest.mark.parametrize("check", CHECKS)
def test_torch_accepts_moe_and_route(check: str) -> None:
    router = replace(ROUTERS[2], weight_dtype="float32")
    spec = MoESpec(2, ExpertsSpec(E, D, SWIGLU), router, SHARED)
    gate = [torch.randn(E, D, requires_grad=True), torch.randn(E)]
    beside = [torch.randn(F, D, requires_grad=True), torch.randn(D, F)]
    tensors = [p.requires_grad_() for p in params(SWIGLU, torch.float32)]
    call = (torch.randn(5, D, requires_grad=True), gate, tensors, beside, spec.text)
    torch.library.opcheck(ops.MOE, call, test_utils=check)
    logits = torch.randn(5, E, requires_grad=True)
    torch.library.opcheck(ops.ROUTE, (logits, torch.randn(E), to_text(router)), test_utils=check)
