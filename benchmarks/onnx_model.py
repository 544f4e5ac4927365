"""The model whose exports are compared: a Qwen3-MoE of transformers with random weights, float32.

H model width, I expert hidden width, E experts, K experts per token, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.initialization import no_init_weights

_HEADS = 16


@dataclass(frozen=True)
class Size:
    """Of its attention and its experts."""

    width: int  # H
    hidden: int  # I
    experts: int  # E
    top_k: int  # K
    layers: int
    vocabulary: int

    @property
    def name(self) -> str:
        """As tables have it."""
        return f"{self.layers} layers, H{self.width} I{self.hidden} E{self.experts} K{self.top_k}"

    @property
    def expert_bytes(self) -> int:
        """Of all layers' experts in float32."""
        return self.layers * self.experts * 3 * self.width * self.hidden * 4


SIZES = {
    "mid": Size(width=1024, hidden=704, experts=64, top_k=6, layers=2, vocabulary=1024),
    "tiny": Size(width=64, hidden=32, experts=8, top_k=2, layers=2, vocabulary=64),
}


def build(size: Size) -> PreTrainedModel:
    """The same weights every time; transformers chooses how its experts run."""
    config = Qwen3MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS // 4,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        moe_intermediate_size=size.hidden,
        norm_topk_prob=True,
        max_position_embeddings=512,
        use_cache=False,
    )
    with no_init_weights():  # its own take thrice as long as those below
        model: PreTrainedModel = Qwen3MoeForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        else:  # norms
            parameter.normal_(1, 0.1, generator=generator)
    return model


def parameter_bytes(model: PreTrainedModel) -> int:
    """Shared ones once."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())


def ids(size: Size, batch: int, length: int, seed: int) -> Tensor:
    """Random ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size.vocabulary, (batch, length), generator=generator)
