"""Every architecture of the zoo compiles with all of its layers fused, and answers as the model does."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import dsmoe_compiler as dsmoe
from dsmoe_compiler.models.capacity_experts import CapacityExperts
from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.zoo import build, example_inputs, names, preset
from tests.tiny_models import relative, tokens

TINY = [name for name in names() if name.endswith("-tiny")]
SHAPES = [(3, 9), (1, 1), (0, 5), (2, 0), (1, 120)]
# One token all along: its copies choose the same experts, which have no room for so many.
CROWDED = torch.full((2, 50), 7)
# Float32 sums in another order.
TOLERANCE = 1e-5


def assert_alike(program: Any, model: CausalLM[Any], ids: Tensor) -> None:
    assert relative(program(input_ids=ids), model(input_ids=ids)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_every_layer_fuses_and_answers_as_the_model(name: str, backend: Literal["cpu", "reference"]) -> None:
    model = build(name)
    program = dsmoe.compile(model, (), example_inputs(name), backend=backend)
    assert program.report.fused == len(program.report.layers) == preset(name).config.num_moe_layers
    for shape in SHAPES:
        assert_alike(program, model, tokens(*shape))
    assert_alike(program, model, CROWDED)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in TINY if name != "dense-tiny"])
def test_every_layer_fuses_at_one_size(name: str) -> None:
    model = build(name)
    program = dsmoe.compile(model, (CROWDED,), dynamic_shapes=None)
    assert program.report.fused == preset(name).config.num_moe_layers
    assert_alike(program, model, CROWDED)


@torch.no_grad()
@pytest.mark.parametrize("name", ["switch-tiny", "gshard-tiny"])
def test_a_crowd_loses_tokens(name: str) -> None:
    """What makes the comparison above one of dropped tokens, too."""
    model, kept = build(name), list[Tensor]()
    for module in model.modules():
        if isinstance(module, CapacityExperts):
            module.register_forward_pre_hook(lambda _, args: kept.append((args[1] > 0).any(3).sum((1, 2))))
    model(CROWDED)
    choices = CROWDED.shape[1] * model.config.num_experts_per_tok
    assert len(kept) == 2
    for kept_G in kept:
        assert (kept_G > 0).all() and (kept_G < choices).all()
