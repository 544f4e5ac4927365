"""Router, experts and shared experts in one operator, against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import MoESpec, RouterSpec, SharedSpec
from dsmoe_compiler.runtime.generated import MOE
from tests.gpu import exact
from tests.gpu.layers import Sizes, normal, params_of, spec_of
from tests.gpu.where import DEVICE, DTYPES, INTERPRETED, at_most

pytestmark = pytest.mark.gpu

SIZES = Sizes(96, 72, 16, 4) if INTERPRETED else Sizes(520, 392, 64, 6)
SHARED = 2 * SIZES.width
ROUTERS = {
    "softmax": RouterSpec(SIZES.top_k, "softmax"),
    "softmax, renormalised": RouterSpec(SIZES.top_k, "softmax", renormalize=True, scale=2.5),
    "sigmoid + bias in groups": RouterSpec(
        SIZES.top_k,
        "sigmoid",
        renormalize=True,
        epsilon=1e-20,
        scale=2.5,
        selection_bias=True,
        groups=8,
        top_groups=4,
        group_score="top2",
        group_fill=-math.inf,
    ),
    "softmax in groups": RouterSpec(SIZES.top_k, "softmax", groups=4, top_groups=2),
    "top-k, then softmax": RouterSpec(SIZES.top_k, "softmax", select="logits", logits_bias=True),
}


@dataclass(frozen=True)
class Whole:
    """The arguments of `dsmoe::moe`."""

    x: Tensor
    router: list[Tensor]
    params: list[Tensor]
    shared: list[Tensor]
    spec: MoESpec

    @property
    def arguments(self) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], str]:
        """As the operator takes them."""
        return self.x, self.router, self.params, self.shared, self.spec.text


def whole(
    router: str, tokens: int, dtype: torch.dtype, has_shared: bool, body: str = "SwiGLU stacked"
) -> Whole:
    """A layer with random tensors whose router computes in float32, as models' do, and tokens whose experts
    do not hang on rounding.
    """
    rule = replace(ROUTERS[router], logits_dtype="float32")
    experts = replace(spec_of(body, SIZES), out_dtype=str(dtype).removeprefix("torch."))
    hidden, count = SIZES.hidden, SIZES.experts
    tensors = [normal(count, hidden, dtype=dtype, std=hidden**-0.5)]
    if rule.logits_bias:
        tensors.append(normal(count, dtype=dtype, std=0.3))
    if rule.selection_bias:
        tensors.append(normal(count, dtype=torch.float32, std=0.1))
    shared = SharedSpec(parse_body("linear(mul(silu(linear(x,p0)),linear(x,p1)),p2)"), SHARED)
    always = [
        normal(SHARED, hidden, dtype=dtype, std=hidden**-0.5),
        normal(SHARED, hidden, dtype=dtype, std=hidden**-0.5),
        normal(hidden, SHARED, dtype=dtype, std=SHARED**-0.5),
    ]
    spec = MoESpec(SIZES.top_k, experts, rule, shared if has_shared else None)
    x = decided_tokens(tokens, dtype, tensors, rule)
    return Whole(x, tensors, params_of(body, SIZES, dtype), always if has_shared else [], spec)


def decided_tokens(tokens: int, dtype: torch.dtype, router: list[Tensor], rule: RouterSpec) -> Tensor:
    """Tokens (T, D), those whose selection a rounding could turn replaced by others."""
    x = normal(tokens, SIZES.hidden, dtype=dtype)
    many = normal(4 * tokens + 64, SIZES.hidden, dtype=dtype)
    sure = many[exact.decided(many, router, rule, margin=1e-4)]
    doubtful = ~exact.decided(x, router, rule, margin=1e-4)
    x[doubtful] = sure[: int(doubtful.sum())]
    return x


def check(case: Whole, out: Tensor) -> None:
    assert out.dtype == case.x.dtype
    wanted = exact.moe(case.x, case.router, case.params, case.shared, case.spec)
    exact.assert_near(out, wanted, SHARED, routed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", at_most(20, 0, 1, 20, 600))
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router: str, tokens: int, dtype: torch.dtype) -> None:
    case = whole(router, tokens, dtype, has_shared=False)
    with exact.poisoned():
        out = MOE(*case.arguments)
    check(case, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", at_most(20, 0, 1, 2, 20, 64, 600, 4096))
def test_shared_experts(tokens: int, dtype: torch.dtype) -> None:
    case = whole("sigmoid + bias in groups", tokens, dtype, has_shared=True)
    with exact.poisoned():
        out = MOE(*case.arguments)
    check(case, out)


@pytest.mark.parametrize("body", ["SwiGLU separate", "SwiGLU transposed", "gpt-oss"])
@pytest.mark.parametrize("tokens", at_most(20, 1, 20, 200))
def test_shared_experts_beside_other_bodies(tokens: int, body: str) -> None:
    case = whole("softmax", tokens, DTYPES[0], True, body)
    with exact.poisoned():
        out = MOE(*case.arguments)
    check(case, out)


def test_the_tokens_differ() -> None:
    """Replacing doubtful tokens leaves most of them as they were drawn."""
    case = whole("sigmoid + bias in groups", 64, DTYPES[0], False)
    assert len(torch.unique(case.x, dim=0)) == 64
    assert case.x.device.type == DEVICE.type
