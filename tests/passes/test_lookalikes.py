"""No wrong fusion: what only looks like a known spelling runs as eager, nothing checking the rewrites."""

from typing import Any

import pytest
import torch

from tests.passes import spellings
from tests.passes.checks import assert_same, compiled
from tests.passes.lookalikes import LOOKALIKES, ROUTER_LOOKALIKES, SHARED_LOOKALIKES, Beside, Join
from tests.passes.spellings import Route, Sizes, Spec, Spelled, layer

# Static sizes that coincide, so that no shape can tell two dimensions apart; and dynamic ones.
COINCIDING = {
    "dynamic": (Sizes(16, 8, 8, 2), [(3, 4), (5, 2), (1, 1)]),
    "T = K": (Sizes(16, 8, 8, 4), [(2, 2)]),
    "T = E = K = D": (Sizes(8, 8, 8, 8), [(2, 4)]),
    "two groups of two": (Sizes(16, 8, 4, 2), [(2, 4), (3, 5)]),
    "K = 1": (Sizes(16, 8, 8, 1), [(2, 4)]),
}


def check(spec: Spec, shapes: list[tuple[int, int]], dynamic: bool) -> None:
    made = layer(spec)
    inputs = [torch.randn(*shape, spec.sizes.width) for shape in shapes]
    try:
        with torch.no_grad():
            for x in inputs:
                made(x.clone())
    except (RuntimeError, IndexError):
        pytest.skip("eager does not run at these sizes")
    made = layer(spec)
    options: dict[str, Any] = {} if dynamic else {"dynamic_shapes": None}
    assert_same(compiled(made, shapes[0], spec.sizes.width, verify="off", **options), made, inputs)


@pytest.mark.parametrize("sizes", ["dynamic", "T = K", "T = E = K = D", "K = 1"])
@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=lambda f: f.__name__)
def test_experts(lookalike: Spelled, sizes: str) -> None:
    check(Spec(lookalike, sizes=COINCIDING[sizes][0]), COINCIDING[sizes][1], sizes == "dynamic")


@pytest.mark.parametrize("sizes", ["dynamic", "two groups of two", "T = E = K = D"])
@pytest.mark.parametrize("route", ROUTER_LOOKALIKES, ids=str)
def test_routers(route: Route, sizes: str) -> None:
    spec = Spec(spellings.gathered, route=route, sizes=COINCIDING[sizes][0])
    check(spec, COINCIDING[sizes][1], sizes in ("dynamic", "two groups of two"))


@pytest.mark.parametrize(
    ("shapes", "dynamic"), [([(3, 4), (2, 5)], True), ([(1, 4)], False), ([(4, 1)], False)]
)
@pytest.mark.parametrize("join", SHARED_LOOKALIKES, ids=lambda f: f.__name__)
def test_shared_experts(join: Join, shapes: list[tuple[int, int]], dynamic: bool) -> None:
    made = Beside(join).requires_grad_(False)
    options: dict[str, Any] = {} if dynamic else {"dynamic_shapes": None}
    assert_same(
        compiled(made, shapes[0], verify="off", **options), made, [torch.randn(*s, 16) for s in shapes]
    )


@pytest.mark.parametrize("sizes", ["T = K", "T = E = K = D"])
@pytest.mark.parametrize("spelling", spellings.SPELLINGS, ids=lambda f: f.__name__)
def test_known_spellings_where_sizes_coincide(spelling: Spelled, sizes: str) -> None:
    check(Spec(spelling, sizes=COINCIDING[sizes][0]), COINCIDING[sizes][1], False)
