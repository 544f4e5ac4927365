"""Which of an input's sizes are the batch and the length, and what is said where they are not free."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import dsmoe_compiler as dsmoe
from tests.cost.models import Tied


class Head(nn.Module):
    """Whatever comes, times a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def ids(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.int64)


@pytest.mark.parametrize(
    "model, example", [(Tied(), ids(3, 5)), (Head(), torch.ones(3, 5, 8)), (Head(), torch.ones(5, 8))]
)
def test_ids_and_rows_have_a_batch_and_a_length(model: Tied | Head, example: Tensor) -> None:
    cost = dsmoe.cost(model, (example,), batch=2, seq=7)
    (head,) = (part for part in cost.parts if part.names == ("head",))
    assert (cost.batch, cost.seq) == (2, 7)
    assert head.flops == 2 * 2 * 7 * model.head.weight.numel()
    assert [step.tokens for step in cost.steps] == [2, 14]
    assert cost.remarks == ()


def test_a_step_of_one_token_is_the_only_one() -> None:
    cost = dsmoe.cost(Head(), (torch.ones(3, 5, 8),), batch=4, seq=1)
    assert [(step.batch, step.length) for step in cost.steps] == [(4, 1)]


class Masked(nn.Module):
    """A mask for every pair of tokens, and numbers whose size has nothing to do with the tokens'."""

    def forward(self, input_ids: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        scores = mask[:, 0] @ input_ids.unsqueeze(-1).float()
        return scores * (table @ table)


def test_other_inputs_follow_and_what_is_neither_stays() -> None:
    cost = dsmoe.cost(Masked(), (ids(3, 5), torch.ones(3, 1, 5, 5), torch.ones(11)), batch=2, seq=7)
    assert cost.flops == 2 * (2 * 7 * 7) + 2 * 11
    assert cost.remarks == ("as it was captured, table[0] is 11",)


def test_the_length_is_at_most_what_the_model_takes() -> None:
    cost = dsmoe.cost(Tied(), (ids(3, 5),), dynamic_shapes=({0: Dim.AUTO, 1: Dim("length", max=64)},))
    assert cost.seq == 64
    with pytest.raises(dsmoe.ShapeError, match="dimension 1 is 65"):
        dsmoe.cost(Tied(), (ids(3, 5),), seq=65, dynamic_shapes=({0: Dim.AUTO, 1: Dim("length", max=64)},))


def test_the_usual_length() -> None:
    assert dsmoe.cost(Tied(), (ids(3, 5),)).seq == 4096


def test_what_capture_fixed_is_said() -> None:
    cost = dsmoe.cost(Tied(), (ids(3, 5),), batch=7, seq=9, dynamic_shapes=None)
    assert (cost.batch, cost.seq) == (3, 5)
    assert cost.remarks == ("as it was captured, the batch is 3, the length is 5",)
    assert [step.length for step in cost.steps] == [5]
    rows = dsmoe.cost(Head(), (torch.ones(5, 8),), dynamic_shapes=None)
    assert (rows.batch, rows.seq, rows.remarks) == (1, 5, ("as it was captured, there are 5 tokens",))


def test_the_sizes_of_an_image_stay() -> None:
    cost = dsmoe.cost(nn.Conv2d(3, 4, 1, bias=False), (torch.ones(2, 3, 16, 20),), batch=5, seq=7)
    assert cost.flops == 2 * 5 * 16 * 20 * 3 * 4
    assert cost.remarks == ("as it was captured, the length is 3, input[2] is 16, input[3] is 20",)


@pytest.mark.parametrize("seq", [2**60, 10**30])
def test_more_than_a_tensor_holds_is_wrong_input(seq: int) -> None:
    with pytest.raises(dsmoe.InputError, match=f"1 x {seq} tokens are more than tensors can hold"):
        dsmoe.cost(Tied(), (ids(3, 5),), seq=seq)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seq": 0}, {"seq": -1}])
def test_sizes_are_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(dsmoe.InputError, match="give a positive number"):
        dsmoe.cost(Head(), (torch.ones(5, 8),), **wrong)  # type: ignore[arg-type]
