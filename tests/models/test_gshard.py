"""GShard's layer against algorithm 1 of its paper (arXiv 2006.16668), one token after another."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.models.baseline_configs import GShardConfig
from dsmoe_compiler.models.gshard import GShardMoE
from dsmoe_compiler.models.presets.gshard import GSHARD
from dsmoe_compiler.models.random_weights import randomise
from tests.models.dropping import alike, answers

TINY = GSHARD["gshard-tiny"].config
WIDTH, EXPERTS = TINY.hidden_size, TINY.n_routed_experts
GROUPS, TOKENS = 3, 41
Weights = list[list[float]]


def layer(config: GShardConfig, *, training: bool) -> GShardMoE:
    moe = GShardMoE(config)
    randomise(moe, seed=0)
    return moe.train(training)


def algorithm_1(gates_SE: Tensor, capacity: float, random_S: list[float]) -> Weights:
    """G (S, E) of one group: lines 4-12 and 14-23, the auxiliary loss left out; c_E counts decisions."""
    count = [0] * EXPERTS
    weights = [[0.0] * EXPERTS for _ in gates_SE]
    for s, gates in enumerate(gates_SE.tolist()):
        e1, e2 = sorted(range(EXPERTS), key=lambda e: -gates[e])[:2]
        if count[e1] < capacity:
            weights[s][e1] = gates[e1] / (gates[e1] + gates[e2])
        count[e1] += 1
    for s, gates in enumerate(gates_SE.tolist()):
        e1, e2 = sorted(range(EXPERTS), key=lambda e: -gates[e])[:2]
        g2 = gates[e2] / (gates[e1] + gates[e2])
        if count[e2] < capacity and 2 * g2 > random_S[s]:
            weights[s][e2] = g2
        count[e2] += 1
    return weights


def gates(moe: GShardMoE, x_SD: Tensor) -> Tensor:
    return (x_SD.double() @ moe.gate.weight.double().T).softmax(dim=-1)


def dropped(weights: Weights) -> int:
    """How many of the group's choices found no place."""
    return 2 * len(weights) - sum(weight > 0 for row in weights for weight in row)


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_in_eval_every_second_choice_queues(factor: float) -> None:
    moe = layer(replace(TINY, capacity_factor=factor), training=False)
    x = alike(GROUPS, TOKENS, WIDTH)
    capacity = math.ceil(2 * TOKENS / EXPERTS * factor)
    always = [0.0] * TOKENS
    weights = [algorithm_1(gates(moe, group), capacity, always) for group in x]
    assert all(0 < dropped(group) < 2 * TOKENS for group in weights)
    expected = torch.stack([answers(moe.experts, *pair) for pair in zip(x, weights, strict=True)])
    torch.testing.assert_close(moe(x).double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_training_a_second_choice_of_little_weight_is_dropped_at_random() -> None:
    moe = layer(TINY, training=True)
    x = alike(GROUPS, TOKENS, WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        random_GS = torch.rand(GROUPS, TOKENS).tolist()
        torch.manual_seed(5)
        out = moe(x)
    capacity = math.ceil(2 * TOKENS / EXPERTS)
    weights = [algorithm_1(gates(moe, group), capacity, row) for group, row in zip(x, random_GS, strict=True)]
    in_eval = [algorithm_1(gates(moe, group), capacity, [0.0] * TOKENS) for group in x]
    assert sum(map(dropped, weights)) > sum(map(dropped, in_eval))
    expected = torch.stack([answers(moe.experts, *pair) for pair in zip(x, weights, strict=True)])
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_place_is_one_tokens() -> None:
    moe = layer(TINY, training=False)
    combine = moe.gate(alike(GROUPS, TOKENS, WIDTH))
    assert combine.shape == (GROUPS, TOKENS, EXPERTS, math.ceil(2 * TOKENS / EXPERTS))
    assert (combine > 0).sum(dim=1).max() == 1
    assert (combine > 0).sum(dim=(2, 3)).max() == 2


@torch.no_grad()
def test_a_token_without_a_place_gets_zeros() -> None:
    moe = layer(replace(TINY, capacity_factor=0.2), training=False)
    same = alike(1, 1, WIDTH).expand(1, 20, WIDTH)  # all choose the same two experts, each with 2 places
    out = moe(same)[0]
    assert out[:2].abs().min() > 0
    assert not out[2:].any()


@torch.no_grad()
def test_groups_do_not_take_each_others_places() -> None:
    moe = layer(TINY, training=False)
    x = alike(GROUPS, TOKENS, WIDTH)
    torch.testing.assert_close(moe(x)[1:2], moe(x[1:2]), rtol=0, atol=1e-6)
