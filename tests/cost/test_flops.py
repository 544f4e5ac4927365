"""FLOPs by hand, and against torch's own counter on the model as it runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import dsmoe_compiler as dsmoe
from dsmoe_compiler import api
from dsmoe_compiler.cost_model.cost import cost_of
from dsmoe_compiler.cost_model.formulas import NotCounted, attention, flops_of, grouped_mm
from tests.cost.models import (
    HIDDEN,
    SHARED,
    D,
    E,
    K,
    MoE,
    OfData,
    Refused,
    Tied,
    transformers_call,
    transformers_model,
)

ROUTER, PAIR, ALWAYS = 2 * D * E, 2 * 3 * D * HIDDEN, 2 * 2 * D * SHARED
FAST = ("qwen2_moe",)
SLOW = ("mixtral", "deepseek_v3", "jetmoe", "gpt_oss", "granitemoe", "llama4", "switch_transformers")


def counted(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> int:
    """By torch, while the model runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_fused_layer_does_the_work_of_the_chosen_experts(tokens: int) -> None:
    cost = dsmoe.cost(MoE(), (torch.randn(5, D),), seq=tokens)
    assert dict(cost.kinds) == {
        "router": tokens * ROUTER,
        "routed experts": tokens * K * PAIR,
        "shared experts": tokens * ALWAYS,
    }
    assert cost.flops == tokens * (ROUTER + K * PAIR + ALWAYS)
    (part,) = cost.parts
    assert part.mixture is not None
    assert (part.mixture.experts, part.mixture.top_k, part.mixture.shared) == (E, K, SHARED // HIDDEN)
    assert part.mixture.parameters == E * 3 * D * HIDDEN
    assert (part.flops, part.complete, cost.remarks) == (cost.flops, True, ())


def test_training_counts_three_forwards_without_the_router() -> None:
    cost = dsmoe.cost(MoE(), (torch.randn(5, D),), seq=6)
    assert cost.training_flops == 3 * 6 * (K * PAIR + ALWAYS)


def test_training_is_of_one_sequence_whatever_the_batch() -> None:
    model, ids = Tied(), torch.zeros(3, 5, dtype=torch.int64)
    one, five = (dsmoe.cost(model, (ids,), batch=batch, seq=8) for batch in (1, 5))
    assert five.flops == 5 * one.flops
    assert five.training_flops == one.training_flops == 3 * one.flops


def test_a_refused_layer_counts_as_it_is_written() -> None:
    cost = dsmoe.cost(Refused(), (torch.randn(5, D),), seq=6)
    assert cost.flops == counted(Refused(), torch.randn(6, D)) == 6 * (ROUTER + K * PAIR + ALWAYS)
    assert any("not fused, counted as written" in remark for remark in cost.remarks)
    assert [part.refused for part in cost.parts] == [True, False, False]
    assert all(part.complete for part in cost.parts)


def test_what_depends_on_data_is_said_and_not_counted() -> None:
    cost = dsmoe.cost(OfData(), (torch.randn(5, D),), seq=6)
    assert cost.flops == 6 * (ROUTER + ALWAYS)
    assert f"{2 * E} products are not counted, sizes depend on data: (model)" in cost.remarks
    assert [part.complete for part in cost.parts if part.refused] == [False]


class Attention(nn.Module):
    """Two heads of queries to one of keys and values; a vector and a matrix product beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.score = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 2, 4).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, 4).transpose(1, 2).chunk(2, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(batch, length, 8) @ self.score


def test_attention_counts_all_pairs_and_vectors_count() -> None:
    cost = dsmoe.cost(Attention(), (torch.randn(2, 5, 8),), batch=3, seq=7)
    assert dict(cost.kinds) == {"activations": 3 * 2 * (2 * 7 * 7 * 8), "weights": 3 * 7 * 2 * (64 + 64 + 8)}


def test_formulas() -> None:
    assert attention((3, 4, 5, 6), (3, 2, 7, 6), (3, 2, 7, 9)) == 3 * 4 * 5 * 7 * 2 * (6 + 9)
    assert grouped_mm((11, 3), (4, 3, 5)) == 2 * 11 * 3 * 5
    assert grouped_mm((4, 2, 3), (4, 3, 5)) == 4 * 2 * 2 * 3 * 5
    assert grouped_mm((2, 11), (11, 5)) == 2 * 2 * 11 * 5


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_products_that_torch_does_not_count() -> None:
    aten = torch.ops.aten
    rows = (on_meta(7, 16), on_meta(7, 8), on_meta(4, 16, 8), None)
    assert flops_of(aten.bilinear.default, rows, {}) == 2 * 7 * 16 * 4 * 8 + 2 * 7 * 4 * 8
    batches = (on_meta(4, 6), on_meta(3, 4, 5), on_meta(3, 5, 6))
    assert flops_of(aten.addbmm.default, batches, {}) == 2 * 3 * 4 * 5 * 6


def test_a_whole_attention_in_one_operator_is_not_counted_as_nothing() -> None:
    x, weights = on_meta(2, 5, 8), (on_meta(24, 8), on_meta(24), on_meta(8, 8), on_meta(8))
    with pytest.raises(NotCounted, match="_native_multi_head_attention"):
        flops_of(torch.ops.aten._native_multi_head_attention.default, (x, x, x, 8, 2, *weights), {})


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.fft.fft(x).real @ x.T
        return out


class Masking(nn.Module):
    """Makes its own mask, and moves what it computed to a device by name."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), -1.0, device="cpu")
        out: Tensor = (x @ x.transpose(1, 2) + mask).to("cpu") @ x
        return out


def test_nothing_is_computed_however_large_it_would_be() -> None:
    """The mask alone would take 4 TB."""
    length = 1_000_000
    cost = dsmoe.cost(Masking(), (torch.randn(2, 5, 4),), seq=length)
    assert cost.flops == 2 * 2 * length * length * 4
    assert cost.remarks == ("as it was captured, x[2] is 4",)


class Made(TorchDispatchMode):
    """While open, where tensors are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.devices |= {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


def test_what_a_model_makes_on_its_own_device_is_not_made() -> None:
    done = api.optimize(Masking(), (torch.randn(2, 5, 4),), verify="off")
    with Made() as made:
        cost_of(done.graph, done.report, seq=7)
    assert made.devices == {"meta"}


def test_an_operator_that_nobody_can_count_is_said() -> None:
    cost = dsmoe.cost(Opaque(), (torch.randn(5, 4),), seq=6)
    assert cost.flops == 2 * 6 * 6 * 4
    assert "1 product is not counted, what aten::fft_fft computes is not known: (model)" in cost.remarks


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_families_cost_what_torch_counts_while_they_run(name: str) -> None:
    model = transformers_model(name)
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    call = transformers_call(name, 5, 9)
    cost = dsmoe.cost(model, (), transformers_call(name, 3, 12), batch=5, seq=9)
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())
    while_it_runs = counted(model, **call)
    if name == "llama4":  # runs every expert on every token, the op those that were chosen
        routed = dict(cost.kinds)["routed experts"]
        while_it_runs -= routed * (8 - 2) // 2
    if name == "jetmoe":  # its attention is a mixture of experts, too, which is not fused
        assert any("sizes depend on data" in remark for remark in cost.remarks)
        assert cost.flops < while_it_runs
        return
    assert cost.flops == while_it_runs


def test_fused_or_not_a_model_costs_the_same() -> None:
    """The layer gathers a copy of its expert for each pair: the same products."""
    fused = dsmoe.cost(MoE(), (torch.randn(5, D),), seq=10)
    plain = api.optimize(MoE(), (torch.randn(5, D),), pipeline="normalize", verify="off")
    written = cost_of(plain.graph, plain.report, seq=10)
    assert fused.flops == written.flops
    assert not dict(written.kinds).get("routed experts")
