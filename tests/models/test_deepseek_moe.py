"""DeepSeekMoE against the paper's equations, transcribed one token and one expert at a time in float64.

The model runs in float32 on the same weights. A float32 dot product of n ≤ 352 terms summing to about one
is off by some √n·2⁻²⁴ ≈ 1e-6; a dozen follow one another, their errors adding like √12 since norms keep them
from growing: 4e-6 (measured: 2.5e-6). A wrong term changes the logits by far more than TOLERANCE.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.models.config import DeepSeekMoEConfig
from dsmoe_compiler.models.decoder import CausalLM
from dsmoe_compiler.models.deepseek_moe import MoE
from dsmoe_compiler.models.presets.deepseek_moe import DEEPSEEK_MOE
from dsmoe_compiler.models.random_weights import randomise
from dsmoe_compiler.models.softmax_gate import SoftmaxGate
from dsmoe_compiler.models.zoo import build

TOLERANCE = 1e-5
Weights = dict[str, Tensor]


@cache
def tiny() -> CausalLM[Any]:
    return build("deepseek-moe-tiny")


@cache
def tiny_weights() -> Weights:
    return {name: value.double() for name, value in tiny().state_dict().items()}


def tiny_config() -> DeepSeekMoEConfig:
    return DEEPSEEK_MOE["deepseek-moe-tiny"].config


def tokens(batch: int, length: int) -> Tensor:
    vocabulary = tiny_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


# --- The transcription: vectors and sums only, nothing of the model's code. ---


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms_norm(u: Tensor, weight: Tensor) -> Tensor:
    return u / math.sqrt(float((u @ u) / len(u)) + 1e-6) * weight


def ffn(u: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (silu(gate @ u) * (up @ u))


def moe(u: Tensor, weights: Weights, at: str) -> Tensor:
    """Eq. 9-11 for one token, without the residual: Ks shared experts one by one, then the routed ones."""
    config = tiny_config()
    width, k_shared = config.moe_intermediate_size, config.n_shared_experts
    h = torch.zeros_like(u)
    for i in range(k_shared):
        mine = slice(i * width, (i + 1) * width)
        h += ffn(
            u,
            weights[f"{at}.shared_experts.gate_proj.weight"][mine],
            weights[f"{at}.shared_experts.up_proj.weight"][mine],
            weights[f"{at}.shared_experts.down_proj.weight"][:, mine],
        )
    affinity = torch.exp(weights[f"{at}.gate.weight"] @ u)
    s = affinity / affinity.sum()
    kth_best = sorted(s.tolist(), reverse=True)[config.num_experts_per_tok - 1]
    for i in range(config.n_routed_experts):
        if s[i] >= kth_best:
            gate_up = weights[f"{at}.experts.gate_up_proj"][i]
            h += s[i] * ffn(u, gate_up[:width], gate_up[width:], weights[f"{at}.experts.down_proj"][i])
    return h


def rotated(head: Tensor, position: int) -> Tensor:
    """Features i and i + d/2 as one complex number, turned by position · θ_i."""
    half = len(head) // 2
    turned = torch.empty_like(head)
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / len(head))
        z = complex(head[i], head[i + half]) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def attention(u: Tensor, weights: Weights, at: str) -> Tensor:
    """u (L, D), every head and position by itself."""
    heads = tiny_config().num_attention_heads
    q, k, v = ((u @ weights[f"{at}.{name}_proj.weight"].T).chunk(heads, dim=1) for name in "qkv")
    columns = []
    for head in range(heads):
        rows = []
        for t in range(len(u)):
            query = rotated(q[head][t], t)
            past = torch.stack([query @ rotated(k[head][i], i) for i in range(t + 1)])
            share = torch.exp(past / math.sqrt(len(query)))
            rows.append((share / share.sum()) @ v[head][: t + 1])
        columns.append(torch.stack(rows))
    return torch.cat(columns, dim=1) @ weights[f"{at}.o_proj.weight"].T


def language_model(ids: Tensor, weights: Weights) -> Tensor:
    """Logits (L, V) of one sequence (L,), eq. 1-2 layer by layer."""
    config = tiny_config()
    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        normed = torch.stack([rms_norm(row, weights[f"{at}.input_layernorm.weight"]) for row in h])
        u = h + attention(normed, weights, f"{at}.self_attn")
        rows = []
        for row in u:
            x = rms_norm(row, weights[f"{at}.post_attention_layernorm.weight"])
            if layer < config.first_k_dense_replace:
                gate, up, down = (weights[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
                rows.append(row + ffn(x, gate, up, down))
            else:
                rows.append(row + moe(x, weights, f"{at}.mlp"))
        h = torch.stack(rows)
    last = torch.stack([rms_norm(row, weights["model.norm.weight"]) for row in h])
    return last @ weights["lm_head.weight"].T


# --- The model against it. ---


@torch.no_grad()
def test_the_model_is_the_paper() -> None:
    ids = tokens(2, 7)
    expected = torch.stack([language_model(row, tiny_weights()) for row in ids])
    assert 0.3 < expected.std() < 3  # sane logits, or an absolute tolerance says nothing
    torch.testing.assert_close(tiny()(ids).double(), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_one_moe_layer_is_equation_9() -> None:
    layer = tiny().get_submodule("model.layers.1.mlp")
    x = torch.randn(1, 23, 96, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([moe(u, tiny_weights(), "model.layers.1.mlp") for u in x[0].double()])
    torch.testing.assert_close(layer(x)[0].double(), expected, rtol=0, atol=TOLERANCE)


def gate(num_experts: int, num_experts_per_tok: int) -> SoftmaxGate:
    """V1's gate of tokens of width 2."""
    config = replace(
        tiny_config(),
        hidden_size=2,
        num_attention_heads=1,
        n_routed_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
    )
    return SoftmaxGate(config)


def test_the_gate_neither_renormalises_nor_scales() -> None:
    small = gate(num_experts=3, num_experts_per_tok=2)
    with torch.no_grad():
        small.weight.copy_(torch.tensor([[0.0, 0.0], [math.log(2), 0.0], [0.0, math.log(5)]]))
    ids, weights = small(torch.tensor([[1.0, 1.0]]))
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[5 / 8, 2 / 8]]))


def test_the_gate_scores_in_float32_where_bfloat16_would_tie() -> None:
    small = gate(num_experts=2, num_experts_per_tok=1).bfloat16()
    with torch.no_grad():
        small.weight.copy_(torch.tensor([[256.0, 0.0], [256.0, 0.5]]))  # 256.5 is 256 in bfloat16
    ids, weights = small(torch.ones(1, 2, dtype=torch.bfloat16))
    assert ids.item() == 1
    assert weights.dtype == torch.float32


@torch.no_grad()
def test_equal_scores_still_choose_k_distinct_experts() -> None:
    layer = MoE(tiny_config())
    randomise(layer, seed=0)
    layer.get_parameter("gate.weight").zero_()
    ids, weights = layer.gate(torch.randn(5, 96))
    assert all(len(set(row)) == 4 for row in ids.tolist())
    torch.testing.assert_close(weights, torch.full((5, 4), 1 / 16))


@pytest.mark.parametrize("shape", [(3, 9), (1, 300), (0, 5), (1, 1), (2, 0)])
@torch.no_grad()
def test_any_batch_and_length_runs(shape: tuple[int, int]) -> None:
    logits = tiny()(tokens(*shape))
    assert logits.shape == (*shape, 512)
    assert logits.isfinite().all()


@torch.no_grad()
def test_a_token_sees_its_past_and_not_its_future() -> None:
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 6] += 1
    difference = (tiny()(ids) - tiny()(changed)).abs().amax(dim=(0, 2))
    assert difference[:6].max() < TOLERANCE
    assert difference[6:].min() > TOLERANCE


def test_parameters_are_named_as_in_the_checkpoints() -> None:
    names = {name for name, _ in tiny().named_parameters()}
    layer = [name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")]
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert sorted(layer) == [
        "input_layernorm.weight",
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
        "mlp.shared_experts.down_proj.weight",
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
        "post_attention_layernorm.weight",
        "self_attn.k_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.v_proj.weight",
    ]
    assert "model.layers.0.mlp.gate_proj.weight" in names
    assert not list(tiny().buffers())
