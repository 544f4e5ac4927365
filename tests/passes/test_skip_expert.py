"""A top-k over one expert more than there are: its tokens go to expert 0 with weight 0, as in ZAYA."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (defines transformers::grouped_mm_fallback)
from torch import Tensor, nn

from tests.passes.checks import assert_same, compiled, only_layer, refusal, some_inputs

D, HIDDEN, EXPERTS = 16, 12, 6


class Layer(nn.Module):
    """Rows sorted by expert, grouped products; `skips` says which ids are the skip expert's."""

    def __init__(self, skips: str) -> None:
        super().__init__()
        self.skips = skips
        self.gate = nn.Linear(D, EXPERTS + 1, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, D) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, D, HIDDEN) * 0.3)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, D)
        weights, ids = torch.softmax(self.gate(x), dim=-1).topk(2, dim=-1)
        skipped = {
            "the last": ids == EXPERTS,
            "from the last on": ids >= EXPERTS,
            "past the last but one": ids > EXPERTS - 1,
            "the last but one": ids == EXPERTS - 1,
            "past the last": ids > EXPERTS,
            "where it is heavy": weights > 0.5,
        }[self.skips]
        weights, ids = weights.masked_fill(skipped, 0), ids.masked_fill(skipped, 0)
        flat, order = ids.reshape(-1).sort()
        ends = torch.histc(flat.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        rows = product(x[order // 2], self.up.transpose(1, 2), ends).relu()
        rows = product(rows, self.down.transpose(1, 2), ends)
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // 2, rows).view_as(hidden)


@pytest.mark.parametrize("skips", ["the last", "from the last on", "past the last but one"])
def test_no_id_is_left_that_is_no_expert(skips: str) -> None:
    torch.manual_seed(0)
    layer = Layer(skips)
    program = compiled(layer, width=D, verify="off")
    assert only_layer(program).fused, only_layer(program).refusal
    assert_same(program, layer, some_inputs(D))


@pytest.mark.parametrize("skips", ["the last but one", "past the last", "where it is heavy"])
def test_one_is_left(skips: str) -> None:
    torch.manual_seed(0)
    assert refusal(compiled(Layer(skips), width=D, verify="off")).code == "R401"
