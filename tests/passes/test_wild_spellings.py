"""Layers as code outside of libraries writes them, flattened and not, become the op; lookalikes do not."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.passes.lift import dense
from tests.passes import apart, wild_lookalikes, wild_spellings
from tests.passes.checks import assert_same, compiled, only_layer
from tests.passes.loops import Case, D, E, Layer, layer
from tests.passes.wild_lookalikes import LOOKALIKES, Lookalike

# Of other batches and lengths than the example's (2, 5); one token; as many positions as experts.
INPUTS = [torch.randn(*shape, D) for shape in ((3, 4), (1, 1), (1, 9), (5, 2))]


def on_few_experts(made: Layer) -> list[Tensor]:
    """Inputs for which every token chooses the same experts, the gates looking at no feature."""
    made.gate.weight.copy_((torch.arange(E)[:, None] / D).expand(E, D))
    return [x.abs() for x in INPUTS]


def assert_fused(made: Layer, slots: int) -> None:
    """The layer's one set of experts is the op, and gives eager's numbers wherever tokens go."""
    program = compiled(made, width=D)
    found = only_layer(program)
    assert found.fused and found.spec is not None, str(found.refusal)
    assert (found.spec.experts.count, found.spec.top_k) == (E, slots)
    assert_same(program, made, INPUTS)
    kept = made.gate.weight.clone()
    assert_same(program, made, on_few_experts(made))
    made.gate.weight.copy_(kept)


@pytest.mark.parametrize("case", wild_spellings.CASES, ids=str)
def test_wild_spellings(case: Case) -> None:
    assert_fused(layer(case), case.top_k)


@pytest.mark.parametrize("case", [*apart.CASES, *wild_spellings.APART], ids=str)
def test_batch_and_positions_apart(case: Case) -> None:
    assert_fused(apart.apart(case), case.top_k)


@pytest.mark.parametrize("case", [apart.CASES[0], apart.CASES[2], apart.CASES[-1]], ids=str)
def test_sizes_that_do_not_vary(case: Case) -> None:
    made = apart.apart(case)
    program = compiled(made, width=D, dynamic_shapes=None)
    assert only_layer(program).fused
    assert_same(program, made, [torch.randn(2, 5, D), torch.randn(2, 5, D).abs()])


@pytest.mark.parametrize("capacity", [64, 2])
def test_switch_as_transformers_ships_it(capacity: int) -> None:
    """Routed at (B, S, D), capacity counted for each sequence: dropped tokens are 0."""
    switch = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    sizes = dict(d_model=D, d_ff=6, num_experts=E, expert_capacity=capacity)
    torch.manual_seed(0)
    made = switch.SwitchTransformersSparseMLP(switch.SwitchTransformersConfig(**sizes)).eval()
    for parameter in made.requires_grad_(False).parameters():
        parameter.normal_(std=0.4)
    program = compiled(made, width=D, require_fused=True)
    assert_same(program, made, [*INPUTS, torch.randn(2, 40, D)])


@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=str)
def test_lookalikes_run_as_eager(lookalike: Lookalike) -> None:
    """Nothing checks the rewrites: a wrong one would be a wrong number."""
    made = lookalike.made()
    program = compiled(made, width=D, verify="off")
    assert any(found.fused for found in program.report.layers) is lookalike.fuses
    assert_same(program, made, INPUTS)
    assert_same(program, made, on_few_experts(made))


@pytest.mark.parametrize(
    "shown", [wild_spellings.softmax_before_all, dense.softmax, wild_lookalikes.softmax_of_filled]
)
def test_the_page_on_adding_a_spelling_shows_what_is_there(shown: Callable[..., object]) -> None:
    page = Path(__file__).parents[2] / "docs" / "adding-a-spelling.md"
    assert inspect.getsource(shown).rstrip() in page.read_text()
