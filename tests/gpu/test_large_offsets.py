"""Tensors of more than 2³¹ elements: a place in them does not fit in an int32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dsmoe_compiler.runtime.generated import EXPERTS
from tests.gpu import exact
from tests.gpu.layers import Layer, Sizes, params_of, routed, shapes, spec_of
from tests.gpu.where import DEVICE, on_a_device

pytestmark = [pytest.mark.gpu, on_a_device]


@pytest.fixture(autouse=True)
def _much_memory() -> Iterator[None]:
    if torch.cuda.mem_get_info()[1] < 60e9:
        pytest.skip("needs a GPU with 60 GB")
    yield
    torch.cuda.empty_cache()  # for the tests that run beside


@pytest.mark.parametrize("body", ["SwiGLU stacked", "SwiGLU transposed"])
@pytest.mark.parametrize("tokens", [2, 64])
def test_weights(tokens: int, body: str) -> None:
    """The last experts lie past 2³¹: of the gate and up matrices and of the down ones."""
    sizes, last = Sizes(4608, 4096, 128, 2), 4
    assert sizes.experts * sizes.width * sizes.hidden > 2**31
    # Drawn in their own dtype: four times as much memory is what float32 would take on the way.
    params = [
        torch.randn(e, *shape, device=DEVICE, dtype=torch.bfloat16) for e, *shape in shapes(body, sizes)
    ]
    for p in params:
        p.mul_(sizes.hidden**-0.5)
    ids = sizes.experts - last + routed("uniform", tokens, replace(sizes, experts=last))
    x = torch.randn(tokens, sizes.hidden, device=DEVICE, dtype=torch.bfloat16)
    weights = torch.rand(ids.shape, device=DEVICE).bfloat16()
    with exact.poisoned():
        out = EXPERTS(*Layer(x, ids, weights, params, spec_of(body, sizes)).arguments)
    # In float64 only those experts that are hit.
    few = replace(sizes, experts=last)
    part = Layer(x, ids - (sizes.experts - last), weights, [p[-last:] for p in params], spec_of(body, few))
    exact.assert_near(out, exact.experts(part), sizes.width)


def test_pairs() -> None:
    """T·K·D and T·K·F past 2³¹: the last tokens' rows, hidden and written."""
    sizes, tokens = Sizes(1040, 1024, 4, 4), 2**19 + 3
    assert tokens * sizes.top_k * sizes.width > 2**31
    x = torch.randn(tokens, sizes.hidden, device=DEVICE, dtype=torch.bfloat16)
    ids = routed("uniform", tokens, sizes)
    weights = torch.rand(ids.shape, device=DEVICE).bfloat16()
    case = Layer(
        x, ids, weights, params_of("SwiGLU stacked", sizes, x.dtype), spec_of("SwiGLU stacked", sizes)
    )
    out = EXPERTS(*case.arguments)
    for part in (slice(0, 64), slice(tokens // 2, tokens // 2 + 64), slice(tokens - 64, tokens)):
        some = replace(case, x=x[part], ids=ids[part], weights=weights[part])
        exact.assert_near(out[part], exact.experts(some), sizes.width)


def test_tokens() -> None:
    """T·D past 2³¹: what is read and what is summed."""
    sizes, tokens = Sizes(4096, 16, 2, 1), 2**19 + 3
    assert tokens * sizes.hidden > 2**31
    x = torch.randn(tokens, sizes.hidden, device=DEVICE, dtype=torch.bfloat16)
    ids = routed("uniform", tokens, sizes)
    weights = torch.rand(ids.shape, device=DEVICE).bfloat16()
    case = Layer(
        x, ids, weights, params_of("SwiGLU stacked", sizes, x.dtype), spec_of("SwiGLU stacked", sizes)
    )
    out = EXPERTS(*case.arguments)
    for part in (slice(0, 64), slice(tokens - 64, tokens)):
        some = replace(case, x=x[part], ids=ids[part], weights=weights[part])
        exact.assert_near(out[part], exact.experts(some), sizes.width)
