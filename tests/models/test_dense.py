"""The dense decoder against transformers' LLaMA with the same weights."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoe_compiler.models.dense import DenseForCausalLM
from dsmoe_compiler.models.presets.dense import DENSE
from dsmoe_compiler.models.random_weights import randomise

TINY = DENSE["dense-tiny"].config


@torch.no_grad()
@pytest.mark.parametrize("heads", [None, 2, 1])
def test_logits_are_those_of_transformers(heads: int | None) -> None:
    config = replace(TINY, num_key_value_heads=heads)
    model = DenseForCausalLM(config).eval()
    randomise(model, seed=0)
    fields = asdict(config)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    theirs: nn.Module = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope))
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))
    expected = theirs.eval()(ids).logits
    assert 0.3 < expected.std() < 3
    # Float32 sums in other orders: see the tolerance of test_deepseek_moe.py.
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
