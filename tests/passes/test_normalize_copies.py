"""What normalize may not drop: a copy the caller gets, and a detach that gradients see."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe


def test_a_copy_that_is_returned_stays_a_copy() -> None:
    program = dsmoe.compile(lambda x: (x.clone(), x + 1), (torch.randn(2, 3),))
    x = torch.randn(4, 3)
    copied, _ = program(x)
    assert copied.data_ptr() != x.data_ptr()
    assert torch.equal(copied, x)


def test_a_view_of_a_copy_that_is_returned_is_of_the_copy() -> None:
    program = dsmoe.compile(lambda x: x.to(x.dtype, copy=True).transpose(0, 1), (torch.randn(2, 3),))
    x = torch.randn(4, 3)
    assert program(x).data_ptr() != x.data_ptr()


def test_two_outputs_do_not_share_memory() -> None:
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y.clone()

    first, second = dsmoe.compile(twice, (torch.randn(2, 3),))(torch.randn(4, 3))
    assert first.data_ptr() != second.data_ptr()


def test_equal_casts_that_are_returned_stay_two() -> None:
    first, second = dsmoe.compile(lambda x: (x.double(), x.double()), (torch.randn(2, 3),))(torch.randn(4, 3))
    assert first.data_ptr() != second.data_ptr()


def test_a_detach_stops_gradients_in_the_program_too() -> None:
    layer = nn.Linear(3, 3)
    program = dsmoe.compile(lambda x: layer(x).detach() * x, (torch.randn(2, 3),))
    x = torch.randn(4, 3, requires_grad=True)
    program(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None and torch.equal(x.grad, layer(x).detach())
