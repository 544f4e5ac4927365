"""Top-k and scatter as comparisons, against torch's own."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_compiler.export.mlir.comparisons import match_scatter, rank_topk


@given(st.integers(0, 5), st.integers(1, 13), st.data())
def test_the_best_of_distinct_numbers(rows: int, count: int, data: st.DataObject) -> None:
    k, largest = data.draw(st.integers(1, count)), data.draw(st.booleans())
    x = torch.stack([torch.randperm(count) for _ in range(rows)] or [torch.empty(0)]).reshape(rows, count)
    values, ids = rank_topk(x.float(), k, largest=largest)
    expected = x.float().topk(k, largest=largest)
    assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)


def test_the_first_of_equal_numbers() -> None:
    values, ids = rank_topk(torch.tensor([[0.1, 0.7, 0.2, 0.7], [-math.inf] * 4]), 3)
    assert ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    assert torch.equal(values, torch.tensor([[0.7, 0.7, 0.2], [-math.inf] * 3]))


def test_ids_stay_ids_among_nan() -> None:
    _, ids = rank_topk(torch.tensor([[math.nan, math.nan, 1.0, math.nan]]), 4)
    assert ids.min() >= 0 and ids.max() < 4


def test_topk_along_other_dimensions_and_of_too_many_is_left() -> None:
    assert rank_topk(torch.rand(4, 3), 2, dim=0) is NotImplemented
    assert rank_topk(torch.rand(1025), 2) is NotImplemented
    assert rank_topk(torch.tensor(1.0), 1) is NotImplemented
    assert rank_topk(torch.rand(3), 0) is NotImplemented


@given(st.integers(0, 4), st.integers(1, 9), st.integers(0, 3))
def test_scatter(rows: int, count: int, marks: int) -> None:
    index = torch.randint(0, count, (rows, marks))
    for x, value in ((torch.rand(rows, count), 7.5), (torch.zeros(rows, count, dtype=torch.bool), True)):
        scattered = match_scatter(x, -1, index, value)
        assert scattered.dtype == x.dtype
        assert torch.equal(scattered, x.scatter(-1, index, value))


def test_scatter_into_other_dimensions_or_part_of_the_rows_is_left() -> None:
    x = torch.rand(4, 3)
    assert match_scatter(x, 0, torch.zeros(1, 3, dtype=torch.int64), 1.0) is NotImplemented
    assert match_scatter(x, 1, torch.zeros(2, 1, dtype=torch.int64), 1.0) is NotImplemented
