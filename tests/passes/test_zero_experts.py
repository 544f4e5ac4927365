"""Experts without tensors beside those with some, as in LongCat-Flash: they hand back what they are given."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.checks import assert_same, compiled, only_layer, refusal, some_inputs

D, HIDDEN, EXPERTS, ALL = 16, 12, 6, 9
Own = Callable[[Tensor, int], Tensor]


class Layer(nn.Module):
    """Scores over ALL experts, of which the first EXPERTS have tensors; `bare` is what the others compute."""

    def __init__(self, bare: Own, entries: int = EXPERTS) -> None:
        super().__init__()
        self.bare = bare
        self.gate = nn.Linear(D, ALL, bias=False)
        self.up = nn.Parameter(torch.randn(entries, HIDDEN, D) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, D, HIDDEN) * 0.3)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, D)
        weights, ids = torch.softmax(self.gate(x), dim=-1).topk(3, dim=-1)
        out = torch.zeros_like(x)
        for e in range(ALL):
            tokens, slots = torch.where(ids == e)
            rows = self.rows(x, tokens, e) * weights[tokens, slots, None]
            out = out.index_add(0, tokens, rows)
        return out.view_as(hidden)

    def rows(self, x: Tensor, tokens: Tensor, e: int) -> Tensor:
        return self.own(x[tokens], e) if self.has_tensors(e) else self.bare(x[tokens], e)

    def has_tensors(self, e: int) -> bool:
        return e < EXPERTS

    def own(self, rows: Tensor, e: int) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.up[e])), self.down[e])


class InTheMiddle(Layer):
    """Expert 2 has none, those after it have."""

    def has_tensors(self, e: int) -> bool:
        return e < EXPERTS and e != 2


class OfOthers(Layer):
    """Experts without tensors hand back another token's row."""

    def rows(self, x: Tensor, tokens: Tensor, e: int) -> Tensor:
        return self.own(x[tokens], e) if self.has_tensors(e) else (x * 2)[tokens]


class ByOthers(Layer):
    """Experts without tensors are weighed twice, by two different weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, D)
        weights, ids = torch.softmax(self.gate(x), dim=-1).topk(3, dim=-1)
        other, out = weights.sqrt(), torch.zeros_like(x)
        for e in range(ALL):
            tokens, slots = torch.where(ids == e)
            weight = weights if self.has_tensors(e) else other
            out = out.index_add(0, tokens, self.rows(x, tokens, e) * weight[tokens, slots, None])
        return out.view_as(hidden)


def identity(rows: Tensor, e: int) -> Tensor:
    return rows


def halves_and_tanh(rows: Tensor, e: int) -> Tensor:
    return torch.tanh(rows) if e == ALL - 1 else rows * 0.5


@pytest.mark.parametrize("bare", [identity, halves_and_tanh], ids=lambda f: f.__name__)
@pytest.mark.parametrize("entries", [EXPERTS, ALL], ids=["as many", "entries for all"])
@pytest.mark.parametrize("verify", ["numeric", "off"])
def test_their_tokens_are_added(bare: Own, entries: int, verify: str) -> None:
    torch.manual_seed(0)
    layer = Layer(bare, entries)
    program = compiled(layer, width=D, verify=verify)
    found = only_layer(program)
    assert found.fused and found.spec is not None, found.refusal
    assert found.spec.experts.count == EXPERTS
    assert_same(program, layer, some_inputs(D))


def test_in_bfloat16() -> None:
    torch.manual_seed(0)
    layer = Layer(identity).to(torch.bfloat16)
    program = compiled(layer, width=D)
    assert only_layer(program).fused, only_layer(program).refusal
    assert_same(program, layer, some_inputs(D, torch.bfloat16))


@pytest.mark.parametrize("lookalike", [InTheMiddle, OfOthers, ByOthers])
def test_what_is_not_that_runs_as_written(lookalike: type[Layer]) -> None:
    torch.manual_seed(0)
    layer = lookalike(identity)
    program = compiled(layer, width=D, verify="off")
    assert refusal(program).code == "R308"
    assert_same(program, layer, some_inputs(D))
