"""Ids outside the experts that a loop visits contribute nothing, whatever became of them after the top-k."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from tests.tiny_models import relative

D, E, K = 16, 8, 2


class _Loop(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        ids = self.change(ids)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda ids: ids,
    "cast": lambda ids: ids.int().long(),
    "reversed": lambda ids: ids.flip(-1),
    "shifted up": lambda ids: ids + 4,
    "shifted below 0": lambda ids: ids - 3,
    "clamped": lambda ids: ids.clamp(max=5),
    "wrapped": lambda ids: ids % 3,
    "dropped": lambda ids: torch.where(ids > 4, ids, -1),
    "sentinel": lambda ids: ids.masked_fill(ids == 2, E),
}


@pytest.mark.parametrize("name", CHANGES)
def test_ids_changed_after_their_selection(name: str) -> None:
    model = _Loop(CHANGES[name])
    program = dsmoe.compile(model, (torch.randn(37, D),), require_fused=True)
    for tokens in (50, 3):
        x = torch.randn(tokens, D)
        assert relative(program(x), model(x)) < 1e-6


class _SlotBySlot(_Loop):
    """Each slot is chosen on its own, from what the one before left."""

    def __init__(self) -> None:
        super().__init__(lambda ids: ids)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        first = logits.max(-1, keepdim=True)
        second = logits.scatter(-1, first.indices, float("-inf")).max(-1, keepdim=True)
        ids = torch.cat([first.indices, second.indices], -1)
        weights = torch.cat([first.values, second.values], -1).softmax(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def test_slots_chosen_one_by_one_are_one_layer() -> None:
    model = _SlotBySlot()
    program = dsmoe.compile(model, (torch.randn(37, D),))
    assert [layer.fused for layer in program.report.layers] == [True]
    x = torch.randn(50, D)
    assert relative(program(x), model(x)) < 1e-6


class _Hashed(nn.Module):
    """One expert a word, by a table: the ids have a sentence's dimensions, and no slots."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(100, D)
        self.table = nn.Buffer(torch.randint(E, (100,)))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, words: Tensor) -> Tensor:
        x_BLD, ids_BL = self.words(words), self.table[words]
        x, ids = x_BLD.flatten(0, 1), ids_BL.flatten()
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[ids == e] = expert(x[ids == e])
        return out.view(x_BLD.shape)


def test_ids_of_a_table_of_words() -> None:
    model = _Hashed()
    program = dsmoe.compile(model, (torch.randint(100, (3, 11)),), require_fused=True)
    assert program.report.fused == 1
    for batch, length in ((2, 5), (1, 1), (0, 4)):
        words = torch.randint(100, (batch, length))
        torch.testing.assert_close(program(words), model(words), rtol=1e-5, atol=1e-6)


class _Sentinels(nn.Module):
    """Grouped products that know of ids of experts elsewhere, E and above: rows masked, ids clamped."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, entries, bias=False)
        self.up = nn.Parameter(torch.randn(E, D, D) * 0.3)
        self.bias = nn.Parameter(torch.randn(E, D))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        ordered, order = ids.reshape(-1).sort()
        ends = torch.histc(ordered.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
        elsewhere = (ordered >= E).unsqueeze(-1)
        ordered.clamp_(max=E - 1)
        rows = x[order // K]
        rows.masked_fill_(elsewhere, 0.0)
        y = torch._grouped_mm(rows, self.up, offs=ends) + self.bias[ordered]
        y = y.masked_fill(elsewhere, 0.0) * weights.reshape(-1)[order, None]
        out: Tensor = y[order.argsort()].view(*ids.shape, D).sum(1)
        return out


def test_sentinels_that_no_id_is() -> None:
    model = _Sentinels(entries=E).bfloat16()
    program = dsmoe.compile(model, (torch.randn(37, D, dtype=torch.bfloat16),), require_fused=True)
    assert program.report.layers[0].spec is not None and program.report.layers[0].spec.router is not None
    x = torch.randn(50, D, dtype=torch.bfloat16)
    assert relative(program(x).float(), model(x).float()) < 1e-2


def test_sentinels_that_ids_are() -> None:
    """The router knows two experts more: their rows are zeros, as in eager."""
    model = _Sentinels(entries=E + 2).bfloat16()
    program = dsmoe.compile(model, (torch.randn(37, D, dtype=torch.bfloat16),))
    assert program.report.fused == 0
    x = torch.randn(50, D, dtype=torch.bfloat16)
    assert program(x).equal(model(x))
