"""Every size that cannot make a model is refused, in one line that names it."""

from collections.abc import Callable
from typing import Any

import pytest

from dsmoe_compiler.models.baseline_configs import GShardConfig, HashLayerConfig, SwitchConfig
from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.decoder_config import DecoderConfig
from dsmoe_compiler.models.moe_config import MoEConfig
from dsmoe_compiler.models.yarn import YarnScaling

GOOD: dict[str, Any] = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    vocab_size=50,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=10,
    first_k_dense_replace=1,
    intermediate_size=40,
)


def test_a_good_configuration_knows_what_follows_from_it() -> None:
    config = DeepSeekMoEConfig(**GOOD)
    assert config.head_dim == 12
    assert config.num_moe_layers == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"n_shared_experts": 0}, "n_shared_experts must be positive, got 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be positive or 0, got -1"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=24"),
        ({"num_attention_heads": 8}, "rotary embedding needs an even head width, got 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds n_routed_experts=8"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace=4 exceeds num_hidden_layers=3"),
        ({"intermediate_size": 0}, "intermediate_size must be positive where layers are dense"),
        ({"rope_theta": -1.0}, "rope_theta must be positive, got -1.0"),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        DeepSeekMoEConfig(**{**GOOD, **change})
    assert str(error.value) == message


def test_an_all_moe_model_needs_no_dense_width() -> None:
    config = DeepSeekMoEConfig(**{**GOOD, "first_k_dense_replace": 0, "intermediate_size": 0})
    assert config.num_moe_layers == 3


DENSE: dict[str, Any] = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=50, intermediate_size=40
)
MOE: dict[str, Any] = dict(DENSE, n_routed_experts=8, moe_intermediate_size=10)
TOP_1: dict[str, Any] = dict(MOE, num_experts_per_tok=1)
TOP_2: dict[str, Any] = dict(MOE, num_experts_per_tok=2)
V3: dict[str, Any] = dict(
    GOOD,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    n_group=2,
    topk_group=1,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
)
SCALING = YarnScaling(factor=2, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (
            GOOD,
            {"topk_method": "best"},
            "topk_method must be one of greedy, group_limited_greedy, noaux_tc, got 'best'",
        ),
        (
            GOOD,
            {"scoring_func": "sigmoid"},
            "topk_method='greedy' needs scoring_func='softmax', got 'sigmoid'",
        ),
        (
            V3,
            {"scoring_func": "softmax"},
            "topk_method='noaux_tc' needs scoring_func='sigmoid', got 'softmax'",
        ),
        (V3, {"topk_group": 3}, "topk_group=3 exceeds n_group=2"),
        (V3, {"n_group": 3}, "n_group=3 must divide n_routed_experts=8"),
        (V3, {"n_group": 8}, "topk_method='noaux_tc' needs two experts a group, got n_group=8"),
        (GOOD, {"n_group": 2}, "topk_method='greedy' has no groups, got n_group=2"),
        (
            V3,
            {"num_experts_per_tok": 5},
            "num_experts_per_tok=5 exceeds the 4 experts of topk_group=1 groups",
        ),
        (V3, {"routed_scaling_factor": 0.0}, "routed_scaling_factor must be positive, got 0.0"),
        (GOOD, {"q_lora_rank": 8}, "q_lora_rank and rope_scaling need kv_lora_rank"),
        (GOOD, {"rope_scaling": SCALING}, "q_lora_rank and rope_scaling need kv_lora_rank"),
        (V3, {"q_lora_rank": 0}, "q_lora_rank must be positive, got 0"),
        (V3, {"kv_lora_rank": 0}, "kv_lora_rank must be positive, got 0"),
        (V3, {"v_head_dim": 0}, "v_head_dim must be positive, got 0"),
        (V3, {"qk_nope_head_dim": -1}, "qk_nope_head_dim must be positive or 0, got -1"),
        (V3, {"qk_rope_head_dim": 5}, "rotary embedding needs an even qk_rope_head_dim, got 5"),
        (GOOD, {"moe_layer_freq": 0}, "moe_layer_freq must be positive, got 0"),
        (GOOD, {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=2"),
    ],
)
def test_what_v2_and_v3_cannot_be_is_refused_by_name(
    good: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    DeepSeekMoEConfig(**good)
    with pytest.raises(ValueError) as error:
        DeepSeekMoEConfig(**{**good, **change})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "good", "change", "message"),
    [
        (
            DecoderConfig,
            DENSE,
            {"intermediate_size": 0},
            "intermediate_size must be positive where layers are dense",
        ),
        (
            DecoderConfig,
            DENSE,
            {"num_key_value_heads": 0},
            "num_key_value_heads=0 must divide num_attention_heads=4",
        ),
        (
            GShardConfig,
            TOP_2,
            {"num_experts_per_tok": 1},
            "GShard chooses num_experts_per_tok=2, got 1",
        ),
        (
            GShardConfig,
            TOP_2,
            {"capacity_factor": 0.0},
            "capacity_factor must be positive, got 0.0",
        ),
        (
            SwitchConfig,
            TOP_1,
            {"num_experts_per_tok": 2},
            "SwitchConfig chooses num_experts_per_tok=1, got 2",
        ),
        (
            SwitchConfig,
            TOP_1,
            {"jitter": -0.1},
            "jitter must be positive or 0, got -0.1",
        ),
        (
            SwitchConfig,
            TOP_1,
            {"min_capacity": 0},
            "min_capacity must be positive, got 0",
        ),
        (
            HashLayerConfig,
            TOP_1,
            {"n_shared_experts": 1},
            "HashLayerConfig has n_shared_experts=0, got 1",
        ),
        (
            YarnScaling,
            dict(factor=2, original_max_position_embeddings=64),
            {"factor": 0.5},
            "rope_scaling: factor must be at least 1, got 0.5",
        ),
        (
            YarnScaling,
            dict(factor=2, original_max_position_embeddings=64),
            {"original_max_position_embeddings": 0},
            "rope_scaling: original_max_position_embeddings must be positive, got 0",
        ),
    ],
)
def test_what_another_model_cannot_be_is_refused_by_name(
    kind: Callable[..., object], good: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    kind(**good)
    with pytest.raises(ValueError) as error:
        kind(**{**good, **change})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("first", "every", "mixtures"),
    [(0, 1, [0, 1, 2, 3, 4]), (1, 1, [1, 2, 3, 4]), (1, 2, [2, 4]), (3, 3, [3])],
)
def test_which_layers_are_mixtures(first: int, every: int, mixtures: list[int]) -> None:
    sizes = dict(TOP_2, num_hidden_layers=5)
    config = MoEConfig(**sizes, first_k_dense_replace=first, moe_layer_freq=every)
    assert [index for index in range(5) if config.is_moe(index)] == mixtures
    assert config.num_moe_layers == len(mixtures)


def test_latent_attention_needs_no_width_that_heads_divide() -> None:
    assert DeepSeekMoEConfig(**{**V3, "hidden_size": 25}).hidden_size == 25
