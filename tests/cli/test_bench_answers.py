"""When two answers are the same but for rounding, and when not."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dsmoe_compiler.cli.bench_answers import difference, rounding_of

BF16 = torch.finfo(torch.bfloat16).eps


def answer(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def with_other_rows(right: Tensor, rows: int) -> Tensor:
    """The answer with its first rows scaled by 2: each off by its own length."""
    other = right.clone()
    other[:rows] *= 2
    return other


def test_the_same_answer_is_right() -> None:
    found = difference([(answer(5), answer(5))], 0.0)
    assert (found.error, found.wrong) == (0.0, "")


@pytest.mark.parametrize(("factor", "right"), [(1 + 1e-4, True), (1 + 1e-3, False)])
def test_float32_is_right_to_half_a_thousandth(factor: float, right: bool) -> None:
    found = difference([(factor * answer(5), answer(5))], 0.0)
    assert found.error == pytest.approx(factor - 1, rel=1e-2)
    assert (found.wrong == "") == right


@pytest.mark.parametrize(("factor", "right"), [(1 + 2 * BF16, True), (1 + 8 * BF16, False)])
def test_bfloat16_weights_round_even_where_float32_is_returned(factor: float, right: bool) -> None:
    assert (difference([(factor * answer(5), answer(5))], BF16).wrong == "") == right


@pytest.mark.parametrize(("rows", "right"), [(3, True), (4, False)])
def test_a_few_tokens_may_have_gone_to_other_experts(rows: int, right: bool) -> None:
    found = difference([(with_other_rows(answer(31), rows), answer(31))], 0.0)
    assert (found.wrong == "") == right
    assert right or "13% of the rows by more than 5.0e-04" in found.wrong


def test_a_lone_token_is_judged_with_those_of_the_other_calls() -> None:
    right, far = answer(1, torch.bfloat16), with_other_rows(answer(1, torch.bfloat16), 1)
    assert difference([(far, right)], BF16).wrong
    assert not difference([(far, right), *[(right, right)] * 5], BF16).wrong
    assert difference([(far, right), (far, right), *[(right, right)] * 4], BF16).wrong


def test_every_output_is_judged_by_itself() -> None:
    small, large = answer(1), answer(1000)
    found = difference([((2 * small, large), (small, large))], 0.0)
    assert found.error == 1.0
    assert found.wrong


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    ("actual", "expected", "says"),
    [
        (answer(5), answer(4), "it is float32[5, 64], eager's is float32[4, 64]"),
        (answer(5), answer(5).double(), "it is float32[5, 64], eager's is float64[5, 64]"),
        (answer(5), torch.full((5, 64), float("nan")), "NaN or infinity in other places"),
        (torch.full((5, 64), float("inf")), answer(5), "NaN or infinity in other places"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "its integers are not eager's"),
        ((answer(5),), answer(5), "it has other parts than eager's"),
        (Output(answer(5)), (answer(5),), "it has other parts than eager's"),
    ],
)
def test_what_no_rounding_explains(actual: object, expected: object, says: str) -> None:
    found = difference([(actual, expected)], BF16)
    assert (found.error, found.wrong) == (float("inf"), says)


def test_nan_in_the_same_places_and_nothing_at_all_are_right() -> None:
    sick = answer(5)
    sick[2, 3] = float("nan")
    assert not difference([(sick, sick.clone())], 0.0).wrong
    empty = torch.zeros(0, 64)
    assert difference([(empty, empty)], 0.0).error == 0.0


def test_the_coarsest_type_of_the_weights_rounds() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    assert rounding_of(layers) == BF16
    assert rounding_of(layers[0]) == torch.finfo(torch.float32).eps
    assert rounding_of(torch.relu) == 0.0
