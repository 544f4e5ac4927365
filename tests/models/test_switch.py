"""Switch Transformer's layer against its paper (arXiv 2101.03961), one token after another, and its gate
against transformers'."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from dsmoe_compiler.models.presets.switch import SWITCH
from dsmoe_compiler.models.random_weights import randomise
from dsmoe_compiler.models.switch import SwitchGate, SwitchMoE
from tests.models.dropping import alike, answers

TINY = SWITCH["switch-tiny"].config
WIDTH, EXPERTS = TINY.hidden_size, TINY.n_routed_experts
GROUPS, TOKENS = 3, 41
Weights = list[list[float]]


def layer(*, training: bool) -> SwitchMoE:
    moe = SwitchMoE(TINY)
    randomise(moe, seed=0)
    return moe.train(training)


def switch(probabilities_SE: Tensor, capacity: int) -> Weights:
    """What each token's experts count for it in one group: p of the best one if it has room, else nothing."""
    seated = [0] * EXPERTS
    weights = [[0.0] * EXPERTS for _ in probabilities_SE]
    for s, p in enumerate(probabilities_SE.tolist()):
        best = max(range(EXPERTS), key=lambda e: p[e])
        if seated[best] < capacity:
            weights[s][best] = p[best]
            seated[best] += 1
    return weights


def expected(moe: SwitchMoE, x: Tensor, at_gate: Tensor, capacity: int) -> tuple[Tensor, int]:
    """The answers (G, S, D), and how many tokens found no place; `at_gate` is what the gate sees."""
    rows, dropped = [], 0
    for group, seen in zip(x, at_gate, strict=True):
        probabilities = (seen.double() @ moe.gate.weight.double().T).softmax(dim=-1)
        weights = switch(probabilities, capacity)
        dropped += sum(not any(row) for row in weights)
        rows.append(answers(moe.experts, group, weights))
    return torch.stack(rows), dropped


@torch.no_grad()
def test_in_eval_an_expert_has_twice_its_share_of_places() -> None:
    moe, x = layer(training=False), alike(GROUPS, TOKENS, WIDTH)
    wanted, dropped = expected(moe, x, x, int(TOKENS / EXPERTS * 2.0))
    assert 0 < dropped < GROUPS * TOKENS
    torch.testing.assert_close(moe(x).double(), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_training_an_expert_has_fewer_places_and_the_gate_sees_jitter() -> None:
    moe, x = layer(training=True), alike(GROUPS, TOKENS, WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        jitter = torch.empty_like(x).uniform_(0.99, 1.01)
        torch.manual_seed(5)
        out = moe(x)
    capacity = int(TOKENS / EXPERTS * 1.25)
    wanted, dropped = expected(moe, x, x * jitter, capacity)
    calm, _ = expected(moe, x, x, capacity)
    assert 0 < dropped < GROUPS * TOKENS
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)
    assert (wanted - calm).abs().max() > 1e-3


@torch.no_grad()
def test_a_small_group_finds_four_places() -> None:
    moe = layer(training=True)
    same = alike(1, 1, WIDTH).expand(1, 6, WIDTH)  # all choose the same expert, whose share would be 1
    out = moe(same)[0]
    assert out[:4].abs().min() > 0
    assert not out[4:].any()


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_gate_is_transformers_router(factor: float) -> None:
    gate = SwitchGate(replace(TINY, eval_capacity_factor=factor)).eval()
    randomise(gate, seed=0)
    native = SwitchTransformersTop1Router(
        SwitchTransformersConfig(
            d_model=WIDTH, num_experts=EXPERTS, expert_capacity=gate.capacity(TOKENS), router_bias=False
        )
    ).eval()
    native.classifier.weight.copy_(gate.weight)
    x = alike(GROUPS, TOKENS, WIDTH)
    chosen, probability, _ = native(x)
    if chosen.is_floating_point():
        pytest.skip("in older releases the probability is returned first, and nobody is dropped")
    assert 0 < chosen.sum() < GROUPS * TOKENS
    torch.testing.assert_close(gate(x).sum(dim=-1), chosen * probability, rtol=0, atol=1e-6)
