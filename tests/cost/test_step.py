"""What a step reads, and the least time it takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dsmoe_compiler as dsmoe
from dsmoe_compiler.cost_model.held import Routing
from dsmoe_compiler.runtime.gpu_catalogue import ceilings, named
from tests.cost.models import HIDDEN, D, E, K, MoE


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 300))
def test_experts_hit(experts: int, top_k: int, tokens: int) -> None:
    routing = Routing(experts, min(top_k, experts))
    hit = routing.hit(tokens)
    assert 0 <= hit <= experts + 1e-9
    assert hit <= tokens * routing.top_k + 1e-9
    assert routing.hit(tokens + 1) >= hit - 1e-9
    if tokens == 1:
        assert hit == pytest.approx(routing.top_k)


def test_experts_hit_is_what_uniform_choices_hit() -> None:
    """Counted, over every pair of choices of two tokens: 2 of 4 experts each."""
    from itertools import combinations, product

    choices = list(combinations(range(4), 2))
    hits = [len({*a, *b}) for a, b in product(choices, choices)]
    assert Routing(4, 2).hit(2) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("seq", [1, 3, 5000])
def test_bytes_and_times_by_hand(seq: int) -> None:
    model = MoE().to(torch.bfloat16)
    step = dsmoe.cost(model, (torch.randn(5, D, dtype=torch.bfloat16),), seq=seq, gpu="A100").steps[-1]
    routed = E * 3 * D * HIDDEN
    dense = sum(p.numel() for p in model.parameters()) - routed
    hit = E * (1 - (1 - K / E) ** seq)
    assert step.tokens == seq
    (found,) = step.hit
    assert found.experts == E
    assert found.expected == pytest.approx(hit)
    assert step.weight_bytes == pytest.approx(2 * (dense + routed * hit / E))
    assert step.bytes_per_token == pytest.approx(step.weight_bytes / seq)
    assert step.intensity == pytest.approx(step.flops / step.weight_bytes)
    assert step.memory_seconds == pytest.approx(step.weight_bytes / 2.04e12)
    assert step.compute_seconds == pytest.approx(step.flops / 312e12)
    assert step.seconds == max(step.memory_seconds, step.compute_seconds)
    assert step.bound == ("compute" if seq == 5000 else "memory")


class Twice(MoE):
    """One layer's experts, chosen twice for each token."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def test_experts_of_two_layers_are_chosen_twice() -> None:
    model = Twice()
    step = dsmoe.cost(model, (torch.randn(5, D),), seq=3).steps[-1]
    routed = E * 3 * D * HIDDEN
    dense = sum(p.numel() for p in model.parameters()) - routed
    assert step.weight_bytes == pytest.approx(4 * (dense + routed * (1 - (1 - K / E) ** 6)))


def test_products_take_as_long_as_their_dtype_does() -> None:
    gpu = ceilings(named("h200"))
    assert gpu.rate("bfloat16") == gpu.rate("float16") == pytest.approx(989e12)
    assert gpu.rate("float32") == gpu.rate("float64") == pytest.approx(67e12)
    assert gpu.memory_rate == pytest.approx(4.8e12)


@pytest.mark.parametrize("name", ["H100", "mi300x", "RTX 4090", "4090"])
def test_gpus_have_short_names(name: str) -> None:
    assert named(name).name.lower().replace(" ", "").endswith(name.lower().replace(" ", ""))


@pytest.mark.parametrize("name", ["B200", "", "0"])
def test_an_unknown_gpu_is_told_the_known_ones(name: str) -> None:
    with pytest.raises(dsmoe.InputError, match="unknown GPU"):
        named(name)
