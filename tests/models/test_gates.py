"""The gates of DeepSeek-V2 and V3 against transformers' and against their formulas."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from dsmoe_compiler.models.bias_balanced_gate import BiasBalancedGate
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.deepseek_moe import GATES
from dsmoe_compiler.models.group_limited_gate import GroupLimitedGate
from dsmoe_compiler.models.presets.deepseek_v2 import DEEPSEEK_V2
from dsmoe_compiler.models.presets.deepseek_v3 import DEEPSEEK_V3
from dsmoe_compiler.models.softmax_gate import SoftmaxGate

V2, V3 = DEEPSEEK_V2["deepseek-v2-tiny"].config, DEEPSEEK_V3["deepseek-v3-tiny"].config
LITE = replace(V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
TOKENS = 200


def fields(config: DeepSeekMoEConfig) -> dict[str, Any]:
    """What transformers' gates read of a configuration."""
    names = "hidden_size n_routed_experts num_experts_per_tok n_group topk_group routed_scaling_factor"
    return {name: getattr(config, name) for name in [*names.split(), "norm_topk_prob"]}


def tokens_and_weight(config: DeepSeekMoEConfig) -> tuple[Tensor, Tensor]:
    """Tokens (T, D), and a gate's weight (E, D) whose logits have a spread of 2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, config.hidden_size, generator=generator)
    weight = torch.randn(config.n_routed_experts, config.hidden_size, generator=generator)
    return x, 2 * config.hidden_size**-0.5 * weight


def dense(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> Tensor:
    """Weights by expert (T, E), NaN where an expert was not chosen: the same in every order of the slots."""
    return torch.full((len(ids_TK), experts), float("nan")).scatter(1, ids_TK, weights_TK)


def assert_same_choices(gate: nn.Module, native: nn.Module, x_TD: Tensor, experts: int) -> None:
    ids, weights = gate(x_TD)
    _, native_weights, native_ids = native(x_TD)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    torch.testing.assert_close(
        dense(ids, weights, experts),
        dense(native_ids, native_weights, experts),
        rtol=0,
        atol=1e-6,
        equal_nan=True,
    )


@torch.no_grad()
@pytest.mark.parametrize("config", [V2, LITE, replace(V2, topk_group=4)])
def test_v2_chooses_and_weighs_as_transformers(config: DeepSeekMoEConfig) -> None:
    x, weight = tokens_and_weight(config)
    native = DeepseekV2TopkRouter(DeepseekV2Config(**fields(config), topk_method=config.topk_method))
    gate = GATES[config.topk_method](config)
    for router in (gate, native):
        router.get_parameter("weight").copy_(weight)
    assert_same_choices(gate, native, x, config.n_routed_experts)


@torch.no_grad()
@pytest.mark.parametrize("config", [V3, replace(V3, norm_topk_prob=False), replace(V3, topk_group=1)])
def test_v3_chooses_and_weighs_as_transformers(config: DeepSeekMoEConfig) -> None:
    x, weight = tokens_and_weight(config)
    # Most biased scores are negative: were those left out 0, they would win.
    bias = torch.randn(config.n_routed_experts, generator=torch.Generator().manual_seed(1)) - 1
    native = DeepseekV3TopkRouter(DeepseekV3Config(**fields(config)))
    gate = BiasBalancedGate(config)
    for router in (gate, native):
        router.get_parameter("weight").copy_(weight)
        router.get_buffer("e_score_correction_bias").copy_(bias)
    assert_same_choices(gate, native, x, config.n_routed_experts)


@torch.no_grad()
def test_v2_leaves_groups_out_that_hold_better_experts() -> None:
    x, weight = tokens_and_weight(V2)
    limited, free = GroupLimitedGate(V2), SoftmaxGate(LITE)
    for gate in (limited, free):
        gate.weight.copy_(weight)
    ids, _ = limited(x)
    members = V2.n_routed_experts // V2.n_group
    assert max(len(set(row)) for row in (ids // members).tolist()) == V2.topk_group
    assert not ids.equal(free(x)[0])


@torch.no_grad()
def test_v2_normalises_instead_of_scaling() -> None:
    x, weight = tokens_and_weight(V2)
    gate = GroupLimitedGate(replace(V2, norm_topk_prob=True))
    gate.weight.copy_(weight)
    torch.testing.assert_close(gate(x)[1].sum(dim=-1), torch.ones(TOKENS))


@torch.no_grad()
def test_v3s_bias_selects_and_does_not_weigh() -> None:
    x, weight = tokens_and_weight(V3)
    gate = BiasBalancedGate(V3)
    gate.weight.copy_(weight)
    ids, weights = gate(x)
    before = dense(ids, weights, V3.n_routed_experts)
    gate.e_score_correction_bias.fill_(0.7)  # for all experts alike: nothing changes
    ids, weights = gate(x)
    torch.testing.assert_close(dense(ids, weights, V3.n_routed_experts), before, equal_nan=True)
    gate.e_score_correction_bias[5] = 10.0
    ids, weights = gate(x)
    assert (ids == 5).any(dim=-1).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.full((TOKENS,), V3.routed_scaling_factor))


@torch.no_grad()
def test_v3s_groups_are_worth_their_two_best() -> None:
    config = replace(V3, n_routed_experts=6, n_group=3, topk_group=1, num_experts_per_tok=2)
    gate = BiasBalancedGate(config)
    gate.weight.zero_()
    # The best expert is in the first group, the best pair in the last one.
    gate.e_score_correction_bias.copy_(torch.tensor([2.0, -9.0, 0.0, 0.0, 1.0, 1.0]))
    ids, _ = gate(torch.zeros(1, config.hidden_size))
    assert sorted(ids[0].tolist()) == [4, 5]
