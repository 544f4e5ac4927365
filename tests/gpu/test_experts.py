"""Routed experts by generated kernels, against the reference in float64: every body, dtype and number of
tokens, routings that leave experts and tokens out, sizes that no tile divides.
"""

import pytest
import torch

from dsmoe_compiler.runtime.generated import EXPERTS
from tests.gpu import exact
from tests.gpu.layers import BODIES, ROUTINGS, Layer, Sizes, layer
from tests.gpu.where import DEVICE, DTYPES, INTERPRETED, at_most

pytestmark = pytest.mark.gpu

# For few tokens and for many, by other kernels.
SMALL = Sizes(hidden=192, width=160, experts=16, top_k=4)
LARGE = Sizes(hidden=64, width=48, experts=16, top_k=4) if INTERPRETED else Sizes(1024, 768, 32, 4)
# Of few tokens so few products that several programs share each one's sum.
SHARED_SUMS = Sizes(hidden=2048, width=64, experts=16, top_k=1)


def check(case: Layer, width: int) -> None:
    with exact.poisoned():
        out = EXPERTS(*case.arguments)
    assert out.dtype == case.x.dtype
    exact.assert_near(out, exact.experts(case), width)


def test_new_memory_is_poisoned() -> None:
    with exact.poisoned():
        assert torch.empty(8, device=DEVICE).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", at_most(40, 1, 40, 300))
@pytest.mark.parametrize("body", BODIES)
def test_every_body(body: str, tokens: int, dtype: torch.dtype) -> None:
    check(layer(body, SMALL, tokens, dtype), SMALL.width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", at_most(64, 0, 1, 2, 7, 64, 130, 512, 4096))
def test_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    check(layer("SwiGLU stacked", LARGE, tokens, dtype), LARGE.width)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", at_most(20, 3, 20, 500))
def test_every_routing(tokens: int, routing: str) -> None:
    case = layer("SwiGLU stacked", LARGE, tokens, DTYPES[0], routing)
    check(case, LARGE.width)
    if routing == "all dropped":
        with exact.poisoned():
            assert not EXPERTS(*case.arguments).any()


# Rows of 16 bytes and not, fewer numbers than a tile has, E = 1 and K = E, primes.
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(104, 88, 8, 2),
        Sizes(100, 77, 3, 3),
        Sizes(33, 17, 1, 1),
        Sizes(8, 8, 60, 8),
        Sizes(257, 131, 7, 6),
        Sizes(136, 520, 64, 1),
        SHARED_SUMS,
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", at_most(19, 1, 19, 257))
@pytest.mark.parametrize("body", ["SwiGLU stacked", "SwiGLU interleaved", "SwiGLU transposed", "gpt-oss"])
def test_sizes_that_no_tile_divides(body: str, sizes: Sizes, tokens: int) -> None:
    check(layer(body, sizes, tokens, DTYPES[0]), sizes.width)


def test_ids_may_be_int32_and_weights_wider() -> None:
    """As routers give them that compute in float32."""
    case = layer("SwiGLU stacked", SMALL, 20, DTYPES[0])
    x, ids, weights, params, spec = case.arguments
    wide = Layer(x, ids.int(), weights.float(), params, case.spec)
    with exact.poisoned():
        out = EXPERTS(*wide.arguments)
    assert out.dtype == torch.float32
    # Products are rounded to x's dtype only once, as hidden rows.
    assert exact.error(out, exact.experts(wide)) <= exact.tolerance(DTYPES[0], SMALL.hidden, SMALL.width)


def test_tensors_that_are_parts_of_others() -> None:
    """x with longer rows in memory, experts that are a slice of more, an odd beginning."""
    case = layer("SwiGLU stacked", SMALL, 20, DTYPES[0])
    x = torch.cat([case.x, case.x], 1)[:, : SMALL.hidden]
    many = [torch.cat([p, p]) for p in case.params]
    sliced = Layer(x, case.ids, case.weights, [p[: SMALL.experts] for p in many], case.spec)
    check(sliced, SMALL.width)
    shifted = []
    for param in case.params:
        memory = torch.empty(param.numel() + 1, dtype=param.dtype, device=param.device)
        shifted.append(memory[1:].view(param.shape).copy_(param))
    check(Layer(case.x, case.ids, case.weights, shifted, case.spec), SMALL.width)
