"""Loops over experts, however they are written, become the op and compute what the model computes."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from dsmoe_compiler.ir.errors import CaptureError
from dsmoe_compiler.program import Program
from dsmoe_compiler.report.report import LayerReport
from tests.passes import loops
from tests.passes.checks import assert_same, compiled, only_layer, refusal
from tests.passes.loops import CASES, REFUSED, Case, D, E, Layer, layer

IDIOMS = {
    **dict.fromkeys(("every_token", "every_token_where", "every_token_scattered"), "dense, weights zeroed"),
    **dict.fromkeys(("every_token_stacked", "every_token_einsum"), "dense, weights zeroed"),
    "every_token_gathered": "dense, rows gathered",
}
NOT_SWIGLU = {
    "biases_and_dropout": "gelu FFN",
    "segments_with_biases": "relu FFN",
    "stacked_transposed": "gelu FFN",
    "stacked_segments": "gelu FFN",
    "matrices": "tanh FFN",
}
INPUTS = [torch.randn(*shape, D) for shape in ((3, 4), (1, 1), (0, 2), (1, 9), (2, 5))]


@cache
def fused(case: Case) -> tuple[Layer, Program, LayerReport]:
    """The layer, compiled once for all tests, and its report."""
    made = layer(case)
    program = compiled(made, width=D)
    return made, program, only_layer(program)


def accepted(made: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs that eager takes: some loops have no form for zero tokens."""

    def takes(x: Tensor) -> bool:
        try:
            made(x)
        except (RuntimeError, IndexError, ValueError):
            return False
        return True

    return [x for x in inputs if takes(x)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_loop(case: Case) -> None:
    """Other shapes, unseen values, one token, none where eager can."""
    made, program, found = fused(case)
    assert found.fused and found.spec is not None, str(found.refusal)
    assert (found.spec.experts.count, found.spec.top_k) == (E, case.slots)
    assert found.idiom == IDIOMS.get(str(case), "loop over experts")
    inputs = accepted(made, INPUTS)
    assert len(inputs) >= len(INPUTS) - 1, "eager fails for zero tokens at most"
    assert_same(program, made, inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_tokens_on_few_experts(case: Case) -> None:
    """Numbers above zero, and gates that do not look at them: every token chooses the same experts."""
    made, program, _ = fused(case)
    kept = made.gate.weight.clone()
    try:
        for order in (1.0, -1.0):
            made.gate.weight.copy_((order * torch.arange(E)[:, None] / D).expand(E, D))
            assert_same(program, made, accepted(made, [x.abs() for x in INPUTS]))
    finally:
        made.gate.weight.copy_(kept)


@pytest.mark.parametrize("name", NOT_SWIGLU)
def test_the_body_is_in_the_spec(name: str) -> None:
    _, _, found = fused(next(c for c in CASES if str(c) == name))
    assert found.spec is not None and found.spec.experts.kind == NOT_SWIGLU[name]


def test_weights_before_the_expert_are_a_spec_of_their_own() -> None:
    _, _, before = fused(Case(loops.weight_before))
    _, _, after = fused(Case(loops.mixtral))
    assert before.spec is not None and before.spec.experts.weighting == "inside"
    assert after.spec is not None and after.spec.experts.weighting == "output"


def test_routers_and_shared_experts_fuse_around_a_loop() -> None:
    for loop in (loops.from_shared, loops.shared_after):
        _, program, found = fused(Case(loop))
        assert found.spec is not None and found.spec.router is not None, program.report.remarks
        assert found.spec.shared is not None, program.report.remarks


@pytest.mark.parametrize(("case", "code", "because"), REFUSED, ids=lambda a: str(a)[:30])
def test_what_is_not_understood_says_why(case: Case, code: str, because: str) -> None:
    made = layer(case)
    program = compiled(made, width=D)
    found = refusal(program)
    assert (found.code, because in found.because) == (code, True), str(found)
    assert found.node and found.source.startswith("loops.py:")
    assert_same(program, made, accepted(made, INPUTS))


def test_indices_as_a_list_of_numbers_are_not_captured() -> None:
    with pytest.raises(CaptureError, match=r"loops.py:\d+ .*tolist"):
        compiled(layer(Case(loops.mixtral_lists)), width=D)


LOW = [
    *("mixtral", "token_masks", "repeated", "deepseek", "in_another_dtype", "counted", "top_one"),
    *("every_token", "slot_by_slot", "weight_as_argument"),
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.bfloat16) for n in LOW), *((n, torch.float16) for n in LOW[:2])],
    ids=lambda a: str(a).removeprefix("torch."),
)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    made = layer(next(c for c in CASES if str(c) == name), dtype)
    program = compiled(made, width=D)
    assert only_layer(program).fused, str(only_layer(program).refusal)
    assert_same(program, made, [torch.randn(3, 4, D).to(dtype), torch.randn(1, 1, D).to(dtype)])


@pytest.mark.parametrize("name", ["mixtral", "token_masks", "repeated", "deepseek", "every_token"])
def test_sizes_that_do_not_vary(name: str) -> None:
    made = layer(next(c for c in CASES if str(c) == name))
    program = compiled(made, width=D, dynamic_shapes=None)
    assert only_layer(program).fused
    assert_same(program, made, [torch.randn(2, 5, D), torch.randn(2, 5, D).abs()])


@pytest.mark.parametrize("example", [(1, 1), (1, 2), (2, 2)], ids=str)
def test_examples_so_small_that_experts_are_empty(example: tuple[int, int]) -> None:
    made = layer(Case(loops.mixtral))
    program = compiled(made, example, D)
    assert only_layer(program).fused
    assert_same(program, made, INPUTS)


def test_experts_share_what_they_share() -> None:
    """A tied matrix is read once an expert from one memory."""
    made, _, found = fused(Case(loops.mixtral, loops.Tied, name="tied"))
    assert found.fused
    assert len({p.data_ptr() for n, p in made.named_parameters(remove_duplicate=False) if "w2" in n}) == 2


class _Layers(nn.Module):
    """Two loops, the second on the first one's result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer(Case(loops.token_masks)), layer(Case(loops.deepseek))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(x + self.first(x))
        return y


def test_two_layers() -> None:
    made = _Layers().eval()
    program = compiled(made, width=D)
    assert [(found.name, found.fused) for found in program.report.layers] == [
        ("first", True),
        ("second", True),
    ]
    assert_same(program, made, accepted(made, INPUTS))
