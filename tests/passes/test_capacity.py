"""Capacity dispatch: every spelling fuses with its drops, and what only looks like it runs as eager."""

import pytest
import torch

from tests.passes.capacity import (
    ALSO,
    CAPACITY,
    EXPERTS,
    LOOKALIKES,
    SPELLINGS,
    WIDTH,
    Dispatched,
    Layer,
    groups_turned,
)
from tests.passes.checks import assert_same, compiled, only_layer

# From a token alone to many more than there are slots for.
SHAPES = ((2, 5), (1, 1), (3, 12), (1, 40))


def _inputs() -> list[torch.Tensor]:
    everybody = torch.randn(1, 1, WIDTH).expand(2, 9, WIDTH) + 0.01 * torch.randn(2, 9, WIDTH)
    return [*(torch.randn(*shape, WIDTH) for shape in SHAPES), everybody.contiguous()]


@pytest.mark.parametrize("verify", ["numeric", "off"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_a_spelling_fuses(spelling: Dispatched, verify: str) -> None:
    layer = Layer(spelling)
    program = compiled(layer, verify=verify)
    found = only_layer(program)
    assert found.fused and found.spec is not None, found.refusal
    assert found.idiom == "capacity slots, one-hot dispatch"
    assert found.spec.experts.count == EXPERTS
    assert_same(program, layer, _inputs())


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_there_are_drops(spelling: Dispatched) -> None:
    """The inputs above would not notice a program that drops nobody otherwise."""
    layer, crowd = Layer(spelling), torch.randn(1, 1, WIDTH).expand(1, 30, WIDTH)
    if spelling.__name__ == "capacity_grows":
        crowd = crowd[:, :8]
    with torch.no_grad():
        out = layer(crowd.contiguous())
    assert (out[0].abs().sum(-1) == 0).any()


@pytest.mark.parametrize("lookalike", [*LOOKALIKES, *ALSO], ids=lambda f: f.__name__)
def test_a_lookalike_runs_as_eager(lookalike: Dispatched) -> None:
    layer = Layer(lookalike)
    program = compiled(layer, verify="off")
    assert_same(program, layer, _inputs())


@pytest.mark.parametrize("tokens", [2, CAPACITY, EXPERTS], ids="KCE")
@pytest.mark.parametrize("dispatched", [*SPELLINGS, *LOOKALIKES, *ALSO], ids=lambda f: f.__name__)
def test_sizes_that_coincide(dispatched: Dispatched, tokens: int) -> None:
    """Static sizes, so that no shape can tell two dimensions apart."""
    layer = Layer(dispatched)
    program = compiled(layer, (1, tokens), verify="off", dynamic_shapes=None)
    assert_same(program, layer, [torch.randn(1, tokens, WIDTH) for _ in range(3)])


def test_groups_and_slots_of_one_size() -> None:
    layer = Layer(groups_turned)
    program = compiled(layer, (CAPACITY, 5), verify="off", dynamic_shapes=None)
    assert_same(program, layer, [torch.randn(CAPACITY, 5, WIDTH)])


@pytest.mark.parametrize(
    "lookalike", [f for f in LOOKALIKES if f is not groups_turned], ids=lambda f: f.__name__
)
def test_a_lookalike_is_refused(lookalike: Dispatched) -> None:
    layers = compiled(Layer(lookalike)).report.layers
    assert layers and all(found.refusal is not None and found.refusal.source for found in layers)
