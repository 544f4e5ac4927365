"""Every size that cannot make a model is refused, in one line that names it."""

from typing import Any

import pytest

from dsmoe_compiler.models.config import DeepSeekMoEConfig

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
