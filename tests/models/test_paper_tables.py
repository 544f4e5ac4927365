"""The presets have the parameters that the papers print for them.

Counted as the DeepSeekMoE paper counts: embedding and LM head included, K of E routed experts activated.
Figures of the validation experiments are to 6 %: they are printed with one digit, and the vocabulary as 8K.
Others are to 1 %, or half of the printed digit.
"""

import pytest

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.decoder_config import DecoderConfig
from dsmoe_compiler.models.moe_config import MoEConfig
from dsmoe_compiler.models.zoo import names, parameter_count, preset

# Billions of parameters: total, activated. DeepSeekMoE (arXiv 2401.06066), Tables 1, 3, 4 and 6.
PRINTED = {
    "dense-0.2b": (0.2, 0.2),
    "hash-layer-2b": (2.0, 0.2),
    "switch-2b": (2.0, 0.2),
    "gshard-2b": (2.0, 0.3),
    "deepseek-moe-2b": (2.0, 0.3),
    "deepseek-moe-16b": (16.4, 2.8),
    "deepseek-7b": (6.9, 6.9),
    "llama2-7b": (6.7, 6.7),
    "deepseek-67b": (67.4, 67.4),
    "gshard-137b": (136.5, 21.6),
    "deepseek-moe-145b": (144.6, 22.2),
}

# DeepSeek-V2 (2405.04434) and V3 (2412.19437): the input embedding is not among the activated parameters.
WITHOUT_EMBEDDING = {
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v2": (236, 21),
    "deepseek-v3": (671, 37),
}

# Billions of parameters of experts alone: total, activated. DeepSeekMoE, Tables 2, 8 and 9.
EXPERTS = {
    "deepseek-moe-2b": (1.89, 0.24),
    "gshard-x1.2": (2.3, 0.28),
    "gshard-x1.5": (2.83, 0.35),
    "dense-x4": (0.47, 0.47),
    "dense-x16": (1.89, 1.89),
}

# One shared expert, the rest routed, of sizes that sum up to 16 standard feed-forwards: Figures 3 and 6 and
# section 4.4. The paper prints no figures for these; they differ from the 2B by rounding of a width alone.
AS_LARGE_AS_THE_2B = [
    "deepseek-moe-2b-1-of-15",
    "deepseek-moe-2b-3-of-31",
    "deepseek-moe-2b-2-shared",
    "deepseek-moe-2b-4-shared",
    "deepseek-moe-2b-half",
]


@pytest.mark.parametrize("name", PRINTED)
def test_parameters_are_as_printed(name: str) -> None:
    count, (total, activated) = parameter_count(name), PRINTED[name]
    relative, half_a_digit = (0.06, 0.0) if total <= 2 else (0.01, 0.05)
    assert count.total / 1e9 == pytest.approx(total, rel=relative, abs=half_a_digit)
    assert count.activated / 1e9 == pytest.approx(activated, rel=relative, abs=half_a_digit)


@pytest.mark.parametrize("name", WITHOUT_EMBEDDING)
def test_v2_and_v3_have_their_parameters(name: str) -> None:
    count, config, (total, activated) = parameter_count(name), preset(name).config, WITHOUT_EMBEDDING[name]
    embedding = config.vocab_size * config.hidden_size
    assert count.total / 1e9 == pytest.approx(total, rel=0.005)
    assert (count.activated - embedding) / 1e9 == pytest.approx(activated, rel=0.03)


def test_the_142b_has_142_3_billion() -> None:
    # Its activated parameters are printed as 12.2 B, which is not what the 145B's 22.2 B are: 13.6 B.
    count = parameter_count("deepseek-moe-142b-half")
    assert count.total / 1e9 == pytest.approx(142.3, rel=0.01)
    assert count.activated / 1e9 == pytest.approx(13.6, rel=0.01)


def experts(config: DecoderConfig) -> tuple[int, int]:
    """Parameters of all experts, and of those of one token; of a dense model's feed-forwards."""
    one_wide = 3 * config.num_hidden_layers * config.hidden_size
    if not isinstance(config, MoEConfig):
        return one_wide * config.intermediate_size, one_wide * config.intermediate_size
    one, shared = one_wide * config.moe_intermediate_size, config.n_shared_experts
    return one * (config.n_routed_experts + shared), one * (config.num_experts_per_tok + shared)


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_parameters_are_as_printed(name: str) -> None:
    for count, printed in zip(experts(preset(name).config), EXPERTS[name], strict=True):
        digits = len(str(printed).partition(".")[2])
        assert round(count / 1e9, digits) == printed


@pytest.mark.parametrize("name", AS_LARGE_AS_THE_2B)
def test_ablations_are_as_large_as_the_2b(name: str) -> None:
    config, whole = preset(name).config, preset("deepseek-moe-2b").config
    assert isinstance(config, DeepSeekMoEConfig)
    assert experts(config)[0] == pytest.approx(experts(whole)[0], rel=0.005)
    halves = 2 if name.endswith("half") else 1
    assert halves * experts(config)[1] == pytest.approx(experts(whole)[1], rel=0.005)


def test_every_model_of_a_paper_is_tested_here() -> None:
    tested = {*PRINTED, *WITHOUT_EMBEDDING, *EXPERTS, *AS_LARGE_AS_THE_2B, "deepseek-moe-142b-half"}
    assert {name for name in names() if not name.endswith(("-tiny", "-demo"))} == tested
