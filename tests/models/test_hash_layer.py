"""Hash Layer: a token's id, and nothing else, chooses its expert, whose answer counts whole."""

import torch

from dsmoe_compiler.models.hash_layer import HashMoE
from dsmoe_compiler.models.presets.hash_layer import HASH_LAYER
from dsmoe_compiler.models.random_weights import randomise
from dsmoe_compiler.models.zoo import build
from tests.models.dropping import expert

TINY = HASH_LAYER["hash-tiny"].config


@torch.no_grad()
def test_each_token_is_its_tables_expert() -> None:
    moe = HashMoE(TINY)
    randomise(moe, seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(TINY.vocab_size, (2, 9), generator=generator)
    x = torch.randn(2, 9, TINY.hidden_size, generator=generator)
    chosen = moe.gate.expert_of_token[ids]
    assert len(set(chosen.flatten().tolist())) > 3
    for batch in range(2):
        for at in range(9):
            wanted = expert(moe.experts, int(chosen[batch, at]), x[batch, at])
            torch.testing.assert_close(moe(x, ids)[batch, at].double(), wanted, rtol=0, atol=1e-5)


def test_the_table_is_fixed_and_uses_every_expert() -> None:
    state, again, other = (build("hash-tiny", seed=seed).state_dict() for seed in (0, 0, 1))
    name = "model.layers.1.mlp.gate.expert_of_token"
    assert sorted(set(state[name].tolist())) == list(range(TINY.n_routed_experts))
    assert state[name].equal(again[name])
    assert not state[name].equal(other[name])
    assert name not in dict(build("hash-tiny").named_parameters())
