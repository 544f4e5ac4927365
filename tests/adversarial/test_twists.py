"""Layers with random near misses run as eager, whatever the compiler makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from tests.adversarial.twists import Twisted, twisted
from tests.passes import spellings
from tests.passes.checks import assert_same, compiled
from tests.passes.spellings import Sizes, Spec, layer

# Sizes that coincide, so that no shape tells two dimensions apart, and such that do not.
SIZES = st.sampled_from(
    [Sizes(8, 4, 4, 2), Sizes(8, 4, 4, 2), Sizes(6, 4, 3, 3), Sizes(4, 4, 4, 4), Sizes(8, 4, 4, 1)]
)


def check(spelling: Twisted, sizes: Sizes, biased: bool, static: bool) -> None:
    """The program gives what the layer gives, nothing checking the rewrites."""
    spec = replace(Spec(spelling, sizes=sizes), body=spellings.BIASED if biased else spellings.SWIGLU)
    made = layer(spec)
    shapes = [(1, sizes.top_k)] if static else [(2, 3), (1, 1), (3, 5)]
    inputs = [torch.randn(*shape, sizes.width) for shape in shapes]
    runs = []
    for x in inputs:
        try:
            runs.append(made(x).shape == x.shape)
        except (RuntimeError, IndexError):
            runs.append(False)
    assume(runs[0])
    program = compiled(made, shapes[0], sizes.width, verify="off", dynamic_shapes=None if static else "auto")
    event("fused" if any(found.fused for found in program.report.layers) else "refused")
    assert_same(program, made, [x for x, ran in zip(inputs, runs, strict=True) if ran])


@given(spelling=twisted(), sizes=SIZES, biased=st.booleans(), static=st.booleans())
@settings(max_examples=40)
def test_some_twists_run_as_eager(spelling: Twisted, sizes: Sizes, biased: bool, static: bool) -> None:
    check(spelling, sizes, biased, static)


@pytest.mark.slow
@given(spelling=twisted(), sizes=SIZES, biased=st.booleans(), static=st.booleans())
@settings(max_examples=600)
def test_twists_run_as_eager(spelling: Twisted, sizes: Sizes, biased: bool, static: bool) -> None:
    check(spelling, sizes, biased, static)
