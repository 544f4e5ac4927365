"""Layers and models small enough to count by hand, and three families of transformers more."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.transformers_models import _FIELDS, FAMILIES, VOCABULARY, family

D, E, K, HIDDEN, SHARED = 16, 8, 2, 12, 24


class MoE(nn.Module):
    """(T, D) -> (T, D): softmax, top-2 of 8, SwiGLU experts, and a ReLU feed-forward of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(E, D))
        self.gate_up = nn.Parameter(torch.randn(E, 2 * HIDDEN, D))
        self.down = nn.Parameter(torch.randn(E, D, HIDDEN))
        self.up, self.back = nn.Linear(D, SHARED, bias=False), nn.Linear(SHARED, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.linear(x, self.gate).softmax(-1).topk(K)
        out: Tensor = self.routed(x, weights, ids) + self.back(self.up(x).relu())
        return out

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Each pair by a copy of its expert."""
        rows, pairs = x.repeat_interleave(K, 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[pairs], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[pairs], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, y.shape[-1]).sum(1)


class Refused(MoE):
    """The same, an expert's rows read across each other: no expert's maths."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows, pairs = x.repeat_interleave(K, 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[pairs], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[pairs], (F.silu(gate) * up).cumsum(0).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, y.shape[-1]).sum(1)


class OfData(MoE):
    """The same, each expert on the rows that chose it, which is refused, too: how many is in the data."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(E):
            token, slot = torch.where(ids == expert)
            gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2, -1)
            y = F.linear((F.silu(gate) * up).cumsum(0), self.down[expert])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Tied(nn.Module):
    """Ids (B, L) to logits: an embedding that is the head as well, a linear layer, and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head, self.unused = nn.Linear(8, 20, bias=False), nn.Linear(3, 3)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)) * self.scale)  # type: ignore[no-any-return]


# The accepted families that tests.transformers_models does not build: (configuration, class, its own fields).
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jetmoe": ("jetmoe", "JetMoeForCausalLM", {"kv_channels": 16, "num_key_value_heads": 4}),
    "llama4": ("llama4_text", "Llama4ForCausalLM", {"intermediate_size_mlp": 96}),
    "switch_transformers": (
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
        | {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "expert_capacity": 64}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 1, "is_encoder_decoder": True},
    ),
}


def transformers_model(name: str) -> nn.Module:
    """One of the eight accepted families, tiny, in eval mode."""
    if name in FAMILIES:
        return family(name)
    key, kind, own = MORE[name]
    config_class = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING[key]
    known = config_class.__dataclass_fields__
    config = config_class(**{k: v for k, v in _FIELDS.items() if k in known} | own)
    config._attn_implementation = "eager"
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model: nn.Module = getattr(module, kind)(config).eval()
    return model


def transformers_call(name: str, batch: int, length: int) -> dict[str, Any]:
    """Arguments of a call of it."""
    ids = torch.randint(3, VOCABULARY, (batch, length))
    if name != "switch_transformers":
        return {"input_ids": ids, "use_cache": False}
    mask = torch.ones(batch, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False} | {
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }
