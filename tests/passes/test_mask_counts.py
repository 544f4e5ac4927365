"""Pairs of each expert counted in a mask of ones: right where the ids of a token differ, and only there."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (defines transformers::grouped_mm_fallback)
from torch import Tensor, nn

from tests.passes.checks import assert_same, compiled, only_layer, some_inputs

D, HIDDEN, EXPERTS = 16, 12, 6


class Split(nn.Module):
    """Rows sorted by expert, split by counts, each expert's products apart."""

    def __init__(self, dtype: torch.dtype, repeats: bool = False) -> None:
        super().__init__()
        self.dtype, self.repeats = dtype, repeats
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, D) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, D, HIDDEN) * 0.3)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, D)
        logits, ids = self.gate(x).topk(2, dim=-1)
        if self.repeats:
            ids = torch.cat([ids[:, :1], ids[:, :1]], dim=-1)
        mask = torch.zeros(x.shape[0], EXPERTS, dtype=self.dtype).scatter(1, ids, 1)
        counts = mask.long().sum(0)
        flat, order = ids.reshape(-1).sort()
        tokens = order // 2
        if self.repeats:  # twice the rows that the mask counts
            counts = counts * 2
        rows = torch.split(x[tokens], counts.tolist())
        y = torch.cat([(rows[e] @ self.up[e].t()).relu() @ self.down[e].t() for e in range(EXPERTS)])
        y = y * logits.softmax(-1).reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens, y).view_as(hidden)


class Offsets(Split):
    """The same by offsets: grouped products of as many rows as were counted, zeros for the rest."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, D)
        logits, ids = self.gate(x).topk(2, dim=-1)
        if self.repeats:
            ids = torch.cat([ids[:, :1], ids[:, :1]], dim=-1)
        mask = torch.zeros(x.shape[0], EXPERTS, dtype=self.dtype).scatter(1, ids, 1)
        ends = mask.long().sum(0).cumsum(0, dtype=torch.int32)
        _, order = ids.reshape(-1).sort()
        product = torch.ops.transformers.grouped_mm_fallback
        rows = product(x[order // 2], self.up.transpose(1, 2), ends).relu()
        y = product(rows, self.down.transpose(1, 2), ends)
        y = y * logits.softmax(-1).reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // 2, y).view_as(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=["floats", "integers"])
@pytest.mark.parametrize("way", [Split, Offsets])
def test_a_mask_counts_ids_that_differ(way: type[Split], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = way(dtype)
    program = compiled(layer, width=D, verify="off")
    assert only_layer(program).fused, only_layer(program).refusal
    assert_same(program, layer, some_inputs(D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=["floats", "integers"])
@pytest.mark.parametrize("way", [Split, Offsets])
def test_it_counts_fewer_where_they_repeat(way: type[Split], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = way(dtype, repeats=True)
    program = compiled(layer, width=D, verify="off")
    found = only_layer(program)
    assert not found.fused and found.refusal is not None
    assert_same(program, layer, some_inputs(D))
