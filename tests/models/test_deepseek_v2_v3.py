"""The tiny DeepSeek-V2 and V3 against transformers' models with the same weights."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.deepseek_moe import DeepSeekMoEForCausalLM
from dsmoe_compiler.models.presets.deepseek_v2 import DEEPSEEK_V2
from dsmoe_compiler.models.presets.deepseek_v3 import DEEPSEEK_V3
from dsmoe_compiler.models.random_weights import randomise
from dsmoe_compiler.models.yarn import YarnScaling
from dsmoe_compiler.models.zoo import build

V2, V3 = DEEPSEEK_V2["deepseek-v2-tiny"].config, DEEPSEEK_V3["deepseek-v3-tiny"].config
OTHER_SCALING = YarnScaling(
    factor=8, original_max_position_embeddings=64, beta_fast=4, mscale=1.0, mscale_all_dim=0.5
)
# Float32 sums in other orders: see the tolerance of test_deepseek_moe.py.
TOLERANCE = 1e-5


def native(config: DeepSeekMoEConfig) -> nn.Module:
    """Transformers' model of the same sizes, its weights not yet these."""
    fields: dict[str, Any] = {name: value for name, value in asdict(config).items() if value is not None}
    scaling = fields.pop("rope_scaling", None)
    rope: dict[str, Any] = {"rope_type": "default"} if scaling is None else {"rope_type": "yarn", **scaling}
    fields["rope_parameters"] = {**rope, "rope_theta": fields.pop("rope_theta")}
    fields["q_lora_rank"] = config.q_lora_rank
    fields["num_key_value_heads"] = config.num_attention_heads
    fields["attn_implementation"] = "eager"
    del fields["moe_layer_freq"], fields["scoring_func"]
    if config.topk_method == "noaux_tc":
        del fields["topk_method"]
        v3: nn.Module = DeepseekV3ForCausalLM(DeepseekV3Config(**fields))
        return v3
    v2: nn.Module = DeepseekV2ForCausalLM(DeepseekV2Config(**fields))
    return v2


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(V2, id="v2"),
        pytest.param(
            replace(
                V2,
                topk_method="greedy",
                n_group=1,
                topk_group=1,
                routed_scaling_factor=1.0,
                q_lora_rank=None,
                rope_scaling=None,
            ),
            id="v2-lite-without-yarn",
        ),
        pytest.param(V3, id="v3"),
        pytest.param(replace(V3, rope_scaling=None), id="v3-without-yarn"),
        pytest.param(replace(V3, rope_scaling=OTHER_SCALING), id="v3-yarn-scales-the-table"),
    ],
)
def test_logits_are_those_of_transformers(config: DeepSeekMoEConfig) -> None:
    model = DeepSeekMoEForCausalLM(config).eval()
    randomise(model, seed=0)
    theirs = native(config).eval()
    # Strict: every name and shape of theirs is one of ours.
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert 0.3 < expected.std() < 3
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=TOLERANCE)


def test_the_bias_keeps_float32_in_other_dtypes() -> None:
    model = build("deepseek-v3-tiny", dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    assert {dtypes[name] for name in biases} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in biases} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek-v2-tiny", "deepseek-v3-tiny"])
def test_a_token_sees_its_past_and_not_its_future(name: str) -> None:
    model = build(name)
    ids = torch.randint(512, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 512
    difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:6].max() < TOLERANCE
    assert difference[6:].min() > TOLERANCE
